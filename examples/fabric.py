"""Lightning Fabric: the loop stays your own, and so does `monitor.step(k)` in it."""

import torch
from _small import loader, show, small_model
from lightning.fabric import Fabric

from repflow.monitor import Monitor, MonitorConfig
from repflow.monitor.sinks import RunFileSink

fabric = Fabric(accelerator="cpu", devices=1)
fabric.launch()
model = small_model()
model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=3e-3))
batches = fabric.setup_dataloaders(loader(31))

run_file = RunFileSink()  # used on the first rank; every rank has a monitor
monitor = Monitor(model, MonitorConfig(every_n_steps=5), sinks=[run_file], name="fabric")

for step, tokens in enumerate(batches):
    with monitor.step(step):
        loss = model(input_ids=tokens, labels=tokens).loss
        fabric.backward(loss)
    monitor.log(loss=loss)
    optimizer.step()
    optimizer.zero_grad()
monitor.close()

show(run_file.path)
