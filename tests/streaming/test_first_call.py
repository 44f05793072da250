"""Without example inputs a budget holds from the first call on: its inputs are rehearsed beforehand."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5EncoderModel,
)

from blockstream.streaming.session import Session

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Return the folder of 84 MiB of Llama whose cache of a token is 48 KiB."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=512,
        num_hidden_layers=12,
        num_attention_heads=8,
        vocab_size=64,
        eos_token_id=None,
    )
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def example() -> str:
    """Return the README's first example of streaming a model."""
    text = (ROOT / "README.md").read_text()
    return next(code for code in re.findall(r"```python\n(.*?)```", text, re.S) if "generate" in code)


def test_the_readmes_example_reads_every_byte_once(llama, monkeypatch):
    ids = torch.arange(2, 6)[None]
    reports, close = [], Session.close
    monkeypatch.setattr(Session, "close", lambda self: (reports.append(self.report()), close(self)))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 24}
    names = {"folder": llama, "inputs": inputs}
    with torch.no_grad():
        exec(example(), names)
    assert names["tokens"].shape == (1, 28)
    config = AutoConfig.from_pretrained(llama)
    with torch.device("meta"):
        nbytes = sum(p.nbytes for p in AutoModelForCausalLM.from_config(config).parameters())
    (stage,) = reports[0]["stages"]
    assert 0.9 * nbytes < stage["read_nbytes"] < 1.1 * nbytes


#: Prints the least that a first call of so many tokens names, then "held" or "broken" for it, and what the
#: call of twice as many does under it.
T5 = """
import sys, torch, blockstream
from blockstream.errors import BudgetError
from transformers import AutoConfig, T5EncoderModel

config = AutoConfig.from_pretrained(sys.argv[1])
ids = torch.ones(1, 384, dtype=torch.long)

def least(error):
    return int(str(error).rpartition("the least is ")[2].removesuffix(" MiB"))

def run(budget, *calls):
    with torch.no_grad(), blockstream.stream(lambda: T5EncoderModel(config), sys.argv[1], budget=budget) as m:
        try:
            for x in calls:
                m(input_ids=x)
        except BudgetError as error:
            print("least", least(error))
        print("held" if blockstream.session(m).report()["budget"]["held"] else "broken")
        return blockstream.session(m).report()["budget"]["peak_nbytes"]

with torch.no_grad(), blockstream.stream(lambda: T5EncoderModel(config), sys.argv[1], budget="1MiB") as m:
    try:
        m(input_ids=ids)
    except BudgetError as error:
        named = least(error) << 20
run(named, ids, ids, torch.cat([ids, ids], 1))
"""


def test_the_least_that_a_first_call_names_holds_and_what_cannot_is_refused_before_it_is_taken(tmp_path):
    torch.manual_seed(0)
    config = T5Config(d_model=128, d_kv=8, num_heads=32, num_layers=3, d_ff=256, vocab_size=64)
    T5EncoderModel(config).save_pretrained(tmp_path)
    command = [sys.executable, "-c", T5, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    refused, held = done.stdout.split("\n")[:2]
    assert refused.startswith("least ") and held == "held", done.stdout


GROWING = """
import sys, torch, blockstream
from blockstream.errors import BudgetError
from transformers import AutoConfig, AutoModelForCausalLM

config = AutoConfig.from_pretrained(sys.argv[1])
ids = torch.arange(4).repeat(32, 1) + 1
given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

def run(budget):
    make = lambda: AutoModelForCausalLM.from_config(config)
    with torch.no_grad(), blockstream.stream(make, sys.argv[1], budget=budget) as m:
        try:
            m.generate(**given, max_new_tokens=60, min_new_tokens=60, do_sample=False)
        except BudgetError as error:
            return str(error), blockstream.session(m).report()["budget"]["held"]
        return "", blockstream.session(m).report()["budget"]["held"]

least = int(run("1MiB")[0].rpartition("the least is ")[2].removesuffix(" MiB"))
said, held = run((least + 8) << 20)
print(held, said)
"""


def test_a_cache_that_outgrows_the_budget_is_refused_before_it_breaks_it(llama):
    command = [sys.executable, "-c", GROWING, str(llama)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("True"), done.stdout
    assert "caches included" in done.stdout and "the least is" in done.stdout
