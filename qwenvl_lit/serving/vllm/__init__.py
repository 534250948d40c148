"""Qwen-VL for vLLM, as a plugin that vLLM finds by its entry point."""
