"""Curvature of a small transformer with a padding mask and outputs with ``.logits`` (--quick: 32 sentences)."""

import sys
from types import SimpleNamespace

import torch
from torch import nn

from curvspace import Objective, class_gradients, eigsh


class Classifier(nn.Module):
    def __init__(self, width: int = 32, classes: int = 4):
        super().__init__()
        self.embed = nn.Embedding(50, width)
        layer = nn.TransformerEncoderLayer(width, nhead=4, dim_feedforward=2 * width, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        self.head = nn.Linear(width, classes)

    def forward(self, tokens, mask):  # mask: True where there is a token
        hidden = self.encoder(self.embed(tokens), src_key_padding_mask=~mask)
        mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return SimpleNamespace(logits=self.head(mean), hidden=hidden)


torch.manual_seed(0)
n = 32 if "--quick" in sys.argv else 512
inputs = {"tokens": torch.randint(50, (n, 12)), "mask": torch.arange(12) < torch.randint(3, 13, (n, 1))}
labels = torch.randint(4, (n,))
model = Classifier()

for part in (None, "head.*", "encoder.layers.0.*"):  # all parameters, the head's, the first layer's
    objective = Objective(model, [(inputs, labels)], parameters=part)
    top = eigsh(objective.hessian(), k=2)
    print(f"{part or 'all':20} P = {objective.num_parameters:6,}  sharpness {float(top.values[0]):.4f}")
c, counts = class_gradients(model, inputs, labels, num_classes=4)
print("class gradients", tuple(c.shape), "of classes with", counts.tolist(), "examples")
