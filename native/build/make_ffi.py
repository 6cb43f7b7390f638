"""Write the C source of the Python extension `hobbit._hobbit` from the marked part of hobbit.h.

usage: make_ffi.py HEADER OUTPUT
"""

import sys

import cffi

# Functions of Python's that C calls.
CALLBACKS = 'extern "Python" void hobbit_python(void *context);'
BEGIN, END = "/* cdef begin */", "/* cdef end */"


def main(header: str, output: str) -> None:
    with open(header) as file:
        declarations = file.read().split(BEGIN)[1].split(END)[0]
    ffi = cffi.FFI()
    ffi.cdef(declarations)
    ffi.cdef(CALLBACKS)
    ffi.set_source("hobbit._hobbit", '#include "hobbit.h"')
    ffi.emit_c_code(output)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
