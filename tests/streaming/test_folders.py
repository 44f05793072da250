"""A stage is named by a folder alone: the class is the one that its config.json names."""

from __future__ import annotations

import json

import pytest
import torch

import blockstream
from blockstream.errors import BlockstreamError, ConfigError
from tests.support.models import aligned

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

IDS = torch.arange(3, 12)[None]
BERT = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64,
    "vocab_size": 48,
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return a folder of transformers, and one of diffusers."""
    folder = tmp_path_factory.mktemp("folders")
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(**BERT)).to(torch.bfloat16).save_pretrained(
        folder / "text"
    )
    diffusers.PriorTransformer(
        num_attention_heads=2, attention_head_dim=8, num_layers=3, embedding_dim=8, num_embeddings=3
    ).save_pretrained(folder / "prior")
    return folder


def test_stages_are_named_by_their_folders_alone(folders):
    x, y, z = (
        torch.randn(size, generator=torch.Generator().manual_seed(0)) for size in ((1, 8), (1, 8), (1, 3, 8))
    )
    with torch.no_grad():
        words = transformers.BertModel.from_pretrained(folders / "text").eval()(IDS)[0]
        want = aligned(diffusers.PriorTransformer.from_pretrained(folders / "prior"))(x, 3, y, z)[0]
    with blockstream.open(arena="1MiB") as session, torch.no_grad():
        text = session.stage("text", folders / "text")
        prior = session.stage("prior", str(folders / "prior"), passes=1)
        assert text.dtype is torch.bfloat16
        assert torch.equal(text(IDS)[0], words)
        assert torch.equal(prior(x, 3, y, z)[0], want)
    with blockstream.stream(folders / "text", dtype="fp32", arena="1MiB") as text:
        assert text.dtype is torch.float32
    with blockstream.open() as session:
        file = next((folders / "text").glob("*.safetensors"))
        assert type(session.stage("text", file)).__name__ == "BertModel"


def test_passes_are_unknown_unless_they_are_named(folders):
    with blockstream.open(arena="1MiB") as session:
        session.stage("text", folders / "text")
        (stage,) = session.draft().schedule.stages
    assert stage.passes == blockstream.Unknown()


def test_what_names_no_model_is_refused_by_name(folders, tmp_path):
    (tmp_path / "pipe").mkdir()
    (tmp_path / "pipe" / "model_index.json").write_text("{}")
    for kind, config in (
        ("bare", None),
        ("strange", {**BERT, "architectures": ["HomeMadeModel"]}),
        ("nameless", BERT),
        ("code", {"_class_name": "MyDiT"}),
    ):
        (tmp_path / kind).mkdir()
        source = next((folders / "text").glob("*.safetensors"))
        (tmp_path / kind / source.name).write_bytes(source.read_bytes())
        if config is not None:
            (tmp_path / kind / "config.json").write_text(json.dumps(config))
    with blockstream.open() as session:
        for model, said in (
            (tmp_path / "bare", r"bare: has no config\.json"),
            (tmp_path / "strange", "names HomeMadeModel, which transformers .* does not have"),
            (tmp_path / "nameless", "names no architecture"),
            (tmp_path / "code", "names MyDiT, which diffusers .* does not have"),
            (tmp_path / "pipe", r"is the folder of a pipeline.*blockstream\.pipeline\(\)"),
            (tmp_path / "nowhere", "there is no such file or folder"),
        ):
            with pytest.raises(BlockstreamError, match=said):
                session.stage("one", model)
        with pytest.raises(ConfigError, match="stage 'one' names no checkpoint"):
            session.stage("one", torch.nn.Linear(2, 2))
        assert session.names == ()
