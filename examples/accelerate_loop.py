"""Accelerate, with gradients accumulated over two micro-batches: entered again with the same number, a step goes on."""

import torch
from _small import loader, show, small_model
from accelerate import Accelerator

from repflow.monitor import Monitor, MonitorConfig
from repflow.monitor.sinks import RunFileSink

accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
model = small_model()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
model, optimizer, batches = accelerator.prepare(model, optimizer, loader(32))

run_file = RunFileSink()  # used on the first rank; every rank has a monitor
monitor = Monitor(model, MonitorConfig(every_n_steps=5), sinks=[run_file], name="accelerate_loop")

step = 0
for tokens in batches:
    with accelerator.accumulate(model):
        with monitor.step(step):
            loss = model(input_ids=tokens, labels=tokens).loss
            accelerator.backward(loss)
        monitor.log(loss=loss)
        optimizer.step()
        optimizer.zero_grad()
    step += accelerator.sync_gradients
monitor.close()

show(run_file.path)
