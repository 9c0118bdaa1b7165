"""Handwritten digits with nothing but MLflow: its fluent API, nested runs, figures, images, a model, autologging.

Nothing of `tracked` is imported. What the address begins with decides where each call goes: to the server, which
the training then waits for a hundred times a second, or into the journal.

Try it, against a server on this machine (`mlflow server`):
    MLFLOW_TRACKING_URI=http://127.0.0.1:5000 python experiments/plain_mlflow.py
    MLFLOW_TRACKING_URI=tracked+http://127.0.0.1:5000 python experiments/plain_mlflow.py
"""

from __future__ import annotations

import matplotlib as mpl
import mlflow
import torch
from matplotlib import pyplot as plt
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

EPOCHS = 3
BATCH = 64


def train(lr: float, images: Tensor, labels: Tensor) -> nn.Module:
    """Train for some epochs, with the loss logged at every step, into the run that is active."""
    mlflow.log_params({"lr": lr, "epochs": EPOCHS, "batch_size": BATCH})
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    step, accuracy = 0, 0.0
    for epoch in range(EPOCHS):
        for batch in torch.randperm(1437).split(BATCH):
            loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            mlflow.log_metric("train/loss", loss.item(), step=step)
        with torch.no_grad():
            outputs = model(images[1437:])
        accuracy = (outputs.argmax(1) == labels[1437:]).float().mean().item()
        mlflow.log_metrics({"val/accuracy": accuracy, "epoch": epoch + 1}, step=step)
    mlflow.set_tag("best", f"{accuracy:.3f}")
    return model


def log_pictures(model: nn.Module, images: Tensor) -> None:
    """Log what the first layer looks for as a figure, and one digit as an image."""
    weights = next(model.parameters()).detach().reshape(-1, 8, 8)
    figure, axes = plt.subplots(4, 8)
    for axis, weight in zip(axes.flat, weights, strict=True):
        axis.imshow(weight, cmap="gray")
        axis.axis("off")
    mlflow.log_figure(figure, "plots/weights.png")
    plt.close(figure)
    digit = (images[0].reshape(8, 8) * 255).to(torch.uint8)
    mlflow.log_image(digit.numpy(), artifact_file="images/digit.png")


def main() -> None:
    mpl.use("Agg")
    pixels, kinds = load_digits(return_X_y=True)
    images, labels = torch.from_numpy(pixels / 16).float(), torch.from_numpy(kinds)
    mlflow.set_experiment("plain-mlflow")
    with mlflow.start_run(run_name="digits", description="Two learning rates, and a baseline.") as parent:
        best, chosen = -1.0, nn.Module()
        for lr in (0.003, 0.01):
            with mlflow.start_run(run_name=f"lr={lr}", nested=True) as child:
                model = train(lr, images, labels)
            # What was written before is there to be read.
            accuracy = mlflow.get_run(child.info.run_id).data.metrics["val/accuracy"]
            if accuracy > best:
                best, chosen = accuracy, model
        with mlflow.start_run(run_name="baseline", nested=True):
            mlflow.sklearn.autolog(log_models=False)
            LogisticRegression(max_iter=200).fit(pixels[:1437], kinds[:1437])
            mlflow.sklearn.autolog(disable=True)
        log_pictures(chosen, images)
        mlflow.log_dict({"lr": [0.003, 0.01]}, "tried.json")
        # Named, the requirements need not be found out by loading the model in another process.
        mlflow.pytorch.log_model(
            chosen, name="model", input_example=images[:2].numpy(), pip_requirements=["torch"]
        )
        mlflow.log_metric("best/accuracy", best)
    print(parent.info.run_id)


if __name__ == "__main__":
    main()
