"""Fine-tuning: training sets without leaks, the DeepSpeed program and its launcher, export, the candidate release."""
