"""The model, the data of a partition, and how both meet."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset


class Net(nn.Module):
    """A small network for images of 8 x 8."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.fc1 = nn.Linear(16 * 16, 64)
        self.fc2 = nn.Linear(64, 10)

    def forward(self, x):
        x = functional.max_pool2d(functional.relu(self.norm(self.conv(x))), 2)
        return self.fc2(functional.relu(self.fc1(x.flatten(1))))


def load_data(partition_id: int, num_partitions: int, batch_size: int):
    """Every num_partitions-th image; four fifths to train on."""
    digits = load_digits()
    x = torch.tensor(digits.images[partition_id::num_partitions], dtype=torch.float32)[:, None] / 16
    y = torch.tensor(digits.target[partition_id::num_partitions])
    cut = 4 * len(x) // 5
    train = DataLoader(TensorDataset(x[:cut], y[:cut]), batch_size=batch_size, shuffle=True)
    return train, DataLoader(TensorDataset(x[cut:], y[cut:]), batch_size=batch_size)


def train(net: nn.Module, loader: DataLoader, epochs: int, lr: float) -> float:
    """Train, and return the mean loss."""
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    net.train()
    total = 0.0
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            loss = functional.cross_entropy(net(x), y)
            loss.backward()
            optimizer.step()
            total += loss.item()
    return total / (epochs * len(loader))


def test(net: nn.Module, loader: DataLoader) -> tuple[float, float]:
    """Loss and accuracy."""
    net.eval()
    correct, loss = 0, 0.0
    with torch.no_grad():
        for x, y in loader:
            output = net(x)
            loss += functional.cross_entropy(output, y, reduction="sum").item()
            correct += int((output.argmax(1) == y).sum())
    size = len(loader.dataset)
    return loss / size, correct / size
