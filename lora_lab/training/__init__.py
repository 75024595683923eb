"""Training: the LightningModule, optimization, the Trainer's settings."""
