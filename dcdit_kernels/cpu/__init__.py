"""The native back-end of CPU tensors: the reference's mathematics in formulations that touch less memory."""
