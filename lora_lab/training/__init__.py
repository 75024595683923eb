"""Training: tasks, the LightningModule, optimization, the Trainer's settings."""
