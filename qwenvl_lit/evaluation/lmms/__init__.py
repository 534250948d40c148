"""The model `qwenvl_lit` of lmms-eval: `python -m lmms_eval --model qwenvl_lit`."""
