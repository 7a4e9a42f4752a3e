"""Makes Triton's interpreter faster.

At every call of a jitted function in a kernel, even `tl.sum`, the interpreter patches the functions of
`triton.language`, which takes most of the time of small kernels. Here it patches once per launch and module. On Triton
versions with other internals nothing is changed.
"""

from triton.runtime import interpreter


def install() -> None:
    if not all(hasattr(interpreter, name) for name in ("_patch_lang", "GridExecutor", "InterpretedFunction")):
        return
    patch, launch, patched_modules = interpreter._patch_lang, interpreter.GridExecutor.__call__, set()

    def patch_once(fn):
        if id(fn.__globals__) in patched_modules:
            return None
        patched_modules.add(id(fn.__globals__))
        return patch(fn)

    def launch_and_patch_anew(*args, **kwargs):
        patched_modules.clear()
        return launch(*args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch_and_patch_anew
