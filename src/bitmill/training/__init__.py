"""What every training here shares: lessons, optimizers, the loop that judges and keeps."""
