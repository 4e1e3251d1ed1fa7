"""A plain PyTorch loop: `monitor.step(k)` stands around the forward and backward of optimizer step k."""

import torch
from _small import loader, show, small_model

from repflow.monitor import Monitor, MonitorConfig
from repflow.monitor.sinks import RunFileSink

model = small_model()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
run_file = RunFileSink()  # repflow-runs/plain_pytorch.db
monitor = Monitor(model, MonitorConfig(every_n_steps=5), sinks=[run_file], name="plain_pytorch")

for step, tokens in enumerate(loader(31)):
    with monitor.step(step):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
    monitor.log(loss=loss)
    optimizer.step()
    optimizer.zero_grad()
monitor.close()

show(run_file.path)
