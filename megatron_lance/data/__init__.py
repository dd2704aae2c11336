"""The data path: parquet records to packs of prompts and pixels (spec/data.md)."""
