"""Requests in, tokens out: scheduler, paged KV cache, model runner. The only home of torch model execution."""
