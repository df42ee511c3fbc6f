// SPDX-License-Identifier: Apache-2.0
// An empty module: importing fisherfast._C runs the static registrations of the other files.
#include <Python.h>

extern "C" PyMODINIT_FUNC PyInit__C(void) {
  static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&definition);
}
