"""Federate LoRA adapters: the pre-trained transformer stays frozen with every client, only what is trained travels.

Needs `pip install "fedkeel[adapters]"` (transformers and peft); nothing is downloaded. A small ViT learns mirrored
digits in one place, as if it came pre-trained; clients who hold upright ones then adapt it together, once as a whole
and once by adapters of rank 4.
"""

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

import fedkeel

CONFIG = ViTConfig(
    image_size=8, patch_size=2, num_channels=1, num_labels=10,
    hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
)  # fmt: skip


class Logits(nn.Module):
    """A Hugging Face model as fedkeel takes it: inputs to logits."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(pixel_values=x).logits


def pretrained() -> nn.Module:
    """The base, trained on mirrored digits; yours would be loaded from a file."""
    pool = fedkeel.build("source", "digits")(fedkeel.Key.root(0))
    x, y = pool.prepare(pool.x).flip(-1), pool.y
    torch.manual_seed(0)
    net = ViTForImageClassification(CONFIG)
    optimiser = torch.optim.Adam(net.parameters(), lr=2e-3)
    for step in range(400):
        rows = torch.arange(64 * step, 64 * (step + 1)) % len(x)
        optimiser.zero_grad()
        nn.functional.cross_entropy(net(pixel_values=x[rows]).logits, y[rows]).backward()
        optimiser.step()
    return net


BASE = pretrained().state_dict()


@fedkeel.rule("model")
def vit(inputs: tuple[int, ...], classes: int, *, rank: int = 0) -> nn.Module:
    """The pre-trained ViT: all of it to train, or adapters of a rank and the classifier."""
    net = ViTForImageClassification(CONFIG)
    net.load_state_dict(BASE)
    if rank:
        lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", modules_to_save=["classifier"])
        net = get_peft_model(net, lora)
    return Logits(net)


job = fedkeel.Job(
    name="adapters",
    rounds=8,
    data={"source": "digits", "partition": "dirichlet(alpha=0.5)", "clients": 6},
    model={"build": "vit(rank=4)"},
    train={"lr": 0.003, "optimiser": "adam", "batch_size": 16},
    record={"evaluate_every": 8},
)
whole = fedkeel.run(job.with_settings(["model.build=vit", "name=whole"]))
run = fedkeel.run(job)
for name, one in (("whole model", whole), ("adapters", run)):
    first = one.metrics[0]["value"]
    sent = sum(row["bytes_up"] for row in one.rounds) / len(one.updates)
    print(f"{name}: {sent / 1000:.0f} kB an update, accuracy {one.final()['value']:.2f} (untuned {first:.2f})")
saved = 1 - sum(row["bytes_up"] for row in run.rounds) / sum(row["bytes_up"] for row in whole.rounds)
print(f"bytes saved: {saved:.0%}")
print("report:", run.path / "report.html")
