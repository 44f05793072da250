"""Without example inputs a budget holds from the first call on: its inputs are rehearsed beforehand."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
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


#: A forward of plain torch, and a cache that it is given back: torch's compiler, which fake tensors need, is
#: imported neither before nor after.
PLAIN = """
import sys, torch, blockstream
from torch import nn
from blockstream.errors import BudgetError

class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        make = lambda: nn.Sequential(nn.Linear(256, 2048), nn.Linear(2048, 256))
        self.blocks = nn.ModuleList(make() for _ in range(4))

    def forward(self, x, state=None):
        for block in self.blocks:
            x = x + block(x)
        return x, {"kept": [torch.cat([*(state or {"kept": []})["kept"], x.repeat(1, 1, 8)], 1)]}

def least(error):
    return int(str(error).rpartition("the least is ")[2].removesuffix(" MiB"))

def run(budget, *sizes):
    with torch.no_grad(), blockstream.stream(Wide, sys.argv[1], budget=budget) as m:
        said, cache = "", None
        try:
            for n in sizes:
                cache = m(torch.ones(1, n, 256), cache)[1]
        except BudgetError as error:
            said = f"least {least(error)}"
        report = blockstream.session(m).report()["budget"]
        return report["held"], said

named = int(run("1MiB", 3000)[1].removeprefix("least "))
print(named, run(named << 20, 3000), run(named + 32 << 20, *[3000] * 9), run(named << 20, 9000))
print([name for name in ("torch._dynamo", "sympy") if name in sys.modules])
"""


def test_a_forward_of_plain_torch_holds_its_budget_or_is_refused_before_it_is_taken(tmp_path):
    blocks = {f"blocks.{n}.{i}": (1 - 2 * i) for n in range(4) for i in range(2)}
    sizes = {name: (2048, 256) if up > 0 else (256, 2048) for name, up in blocks.items()}
    weights = {f"{name}.weight": torch.zeros(size) for name, size in sizes.items()}
    biases = {f"{name}.bias": torch.zeros(size[0]) for name, size in sizes.items()}
    save_file(weights | biases, tmp_path / "model.safetensors")
    command = [sys.executable, "-c", PLAIN, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found, imported, _ = done.stdout.split("\n")
    named, held = found.split(" ", 1)
    assert int(named) > 200 and imported == "[]", done.stdout
    once, grown, larger = ast.literal_eval(f"[{held.replace(') (', '), (')}]")
    assert once == (True, "")
    for broken in (grown, larger):
        assert broken[0] and int(broken[1].removeprefix("least ")) > int(named), done.stdout
