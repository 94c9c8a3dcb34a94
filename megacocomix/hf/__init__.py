"""CoCoMix for transformers. Exports copy the configuration and modeling files, which must not import this package."""
