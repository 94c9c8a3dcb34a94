"""CoCoMix for transformers. The two files beside this one go into every exported folder and import nothing of ours."""
