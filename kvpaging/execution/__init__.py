"""Work: a `StepPlan` becomes tensors, the model runs, a `StepResult` comes back. No queues."""
