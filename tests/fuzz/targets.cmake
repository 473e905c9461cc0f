# Fuzz targets: fuzz_<name>.c, seeds in corpus/<name>/. A new target is one more name here.
set(QSHARD_FUZZ_TARGETS safetensors hf_config base_index config manifest peft_config)
