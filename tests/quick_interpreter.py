"""Triton's interpreter without what it repeats.

At every call of one jitted function by another, of `tl.sum` too, it replaces the functions of `triton.language` by its
own, which takes most of the time of small programs. Once for each launch and module is enough. Where Triton's insides
are others than those known here, nothing is changed.
"""

from triton.runtime import interpreter


def install() -> None:
    if not all(hasattr(interpreter, name) for name in ("_patch_lang", "GridExecutor", "InterpretedFunction")):
        return
    patch, launch, patched = interpreter._patch_lang, interpreter.GridExecutor.__call__, set()

    def patch_once(fn):
        if id(fn.__globals__) in patched:
            return None
        patched.add(id(fn.__globals__))
        return patch(fn)

    def launch_anew(*args, **kwargs):
        patched.clear()
        return launch(*args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch_anew
