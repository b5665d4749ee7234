// Which line of the program runs, from Python's own frames. Part of the module mlpkit._C.
#include "bindings_observe.h"

namespace mlpkit::observing {
namespace {

// Python 3.10 has no public way to an instruction's offset; its line is as good, and dearer.
int offset_of(PyFrameObject* frame) {
#if PY_VERSION_HEX >= 0x030B0000
  return PyFrame_GetLasti(frame);
#else
  return PyFrame_GetLineNumber(frame);
#endif
}

int line_of(PyCodeObject* code, int offset) {
#if PY_VERSION_HEX >= 0x030B0000
  return PyCode_Addr2Line(code, offset);
#else
  return offset;
#endif
}

}  // namespace

Lines::Spot Lines::here() {
  Spot spot;
  PyFrameObject* frame = PyThreadState_GetFrame(PyThreadState_Get());
  while (frame != nullptr) {
    PyCodeObject* code = PyFrame_GetCode(frame);
    const Kind kind = kind_of(code);
    if (kind == user) {
      int& number = numbers_[code][offset_of(frame)];
      if (number == 0) {
        spots_.emplace_back(code, offset_of(frame));
        number = static_cast<int>(spots_.size());
      }
      spot.line = number;
    }
    spot.updating = spot.updating || kind == update || kind == scaler;
    spot.scaling = spot.scaling || kind == scaler;
    spot.guarding = spot.guarding || kind == guard;
    PyFrameObject* back = kind == user ? nullptr : PyFrame_GetBack(frame);
    Py_DECREF(code);
    Py_DECREF(frame);
    frame = back;
  }
  return spot;
}

Lines::Kind Lines::kind_of(PyCodeObject* code) {
  const auto found = kinds_.find(code);
  if (found != kinds_.end()) return found->second;
  Py_INCREF(code);
  const py::handle object(reinterpret_cast<PyObject*>(code));
  const Kind kind = static_cast<Kind>(kind_of_file_(object.attr("co_filename")).cast<int>());
  return kinds_[code] = kind;
}

std::pair<std::string, int> Lines::at(int line) const {
  if (line == 0) return {"", 0};
  const auto& [code, offset] = spots_[line - 1];
  const py::handle object(reinterpret_cast<PyObject*>(code));
  return {object.attr("co_filename").cast<std::string>(), line_of(code, offset)};
}

}  // namespace mlpkit::observing
