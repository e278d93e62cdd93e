"""Files of changes to a model, LoRA and its relatives, textual inversion: read, bound to a model, merged."""
