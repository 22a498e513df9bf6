"""The server: as in Flower's quickstart, but for its strategy."""

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp

from digits.task import Net
from fedkeel.deploy import FedKeel

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation."""
    fraction_evaluate: float = context.run_config["fraction-evaluate"]
    num_rounds: int = context.run_config["num-server-rounds"]
    lr: float = context.run_config["learning-rate"]

    global_model = Net()
    arrays = ArrayRecord(global_model.state_dict())

    strategy = FedKeel(fraction_evaluate=fraction_evaluate, client={"codec": "int8"}, run=context.run_config["run"])

    result = strategy.start(
        grid=grid,
        initial_arrays=arrays,
        train_config=ConfigRecord({"lr": lr}),
        num_rounds=num_rounds,
    )

    state_dict = result.arrays.to_torch_state_dict()
    torch.save(state_dict, "final_model.pt")
