"""Both ends of the Hessian's spectrum of torchvision's ResNet-18, after a few steps on digits (--quick: less)."""

import sys

import torch
import torchvision
from sklearn.datasets import load_digits

from curvspace import Objective, eigsh
from curvspace.subspace import gradient_fraction

quick = "--quick" in sys.argv
torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
x = torch.nn.functional.interpolate(images, size=32).expand(-1, 3, -1, -1)  # as three channels of 32 × 32 pixels
y = torch.tensor(digits.target)

model = torchvision.models.resnet18(num_classes=10)  # or weights="DEFAULT"; here 11.2 million parameters
optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
for _ in range(1 if quick else 30):
    batch = torch.randint(len(x), (4 if quick else 64,))
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
    optimizer.step()

measured = slice(0, 2 if quick else 256)
objective = Objective(model.eval(), (x[measured], y[measured]))  # eval: batch normalisation by its stored statistics
# two pairs of each end in one solve (quick: one); max_basis bounds the memory: 2 vectors of length P for each
pairs = eigsh(
    objective.hessian(), k=2 if quick else 4, which="BE", tol=0.3 if quick else 1e-2, max_basis=16, progress=True
)
for value, residual in zip(pairs.values.tolist(), pairs.residuals.tolist(), strict=True):
    print(f"eigenvalue {value:10.4f}   residual {residual:.1e}")
print(f"{pairs.products} Hessian products for P = {objective.num_parameters:,}")
print(f"{gradient_fraction(objective.gradient(), pairs.vectors):.2f} of the squared gradient lies in their span")
