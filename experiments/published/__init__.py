"""Published quantization studies of vision-language models, run again: one table of rows per paper."""
