"""Without a GPU the Triton kernels run under Triton's interpreter. To be imported before anything imports Triton."""

import importlib.util
import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if importlib.util.find_spec("triton") is not None:
        from triton.runtime import interpreter

        patch_tensor = interpreter._patch_lang_tensor

        def patch_tensor_for_numpy(tensor, scope):
            """Triton 3.6 makes the bound of a range an int from an array of one element, which numpy 2.5 refuses."""
            patch_tensor(tensor, scope)
            scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

        if hasattr(interpreter, "_LangPatchScope"):  # from 3.6 on; both versions that are tested have it
            interpreter._patch_lang_tensor = patch_tensor_for_numpy
