"""Files of changes to a model: LoRA and its relatives, textual inversion. Read, matched, merged."""
