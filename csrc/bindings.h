// Arguments go by name from Python to the fields of a struct.
//
// A native function takes keyword arguments only, and a struct within a struct is a dict. A field's
// name is the argument's, written once: read(FIELD(q), FIELD(k)) reads "q" into to.q and "k" into
// to.k. No order counts; a name that is missing, unknown or of another type raises a TypeError that
// says which. Tensors come as they are: of one whose layout matters the strides are read too, in
// elements and in the order of the dimensions, as stride() gives them.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

#include "common/dtype.h"

namespace collavo {

class Fields;

// An argument's value, and where it was found.
class Value {
 public:
  Value(const Fields& in, PyObject* name, PyObject* object, bool optional)
      : in_(in), name_(name), object_(object), optional_(optional) {}

  PyObject* object() const { return object_; }
  Value item(Py_ssize_t i) const { return {in_, name_, PyList_GET_ITEM(object_, i), false}; }
  [[noreturn]] void wrong(const char* expected) const;
  int64_t integer() const;
  bool boolean() const;
  double number() const;
  // Whether a tensor is absent, which it must be allowed to be.
  bool absent() const;
  // The address of a tensor's first value; null where it is absent. Whatever has data_ptr() is a
  // tensor.
  void* address() const;
  // A tensor's strides in elements.
  template <size_t kDimensions>
  void strides(int64_t (&to)[kDimensions]) const;
  Fields fields() const;

 private:
  PyObject* call(PyObject* method) const;

  const Fields& in_;
  PyObject* name_;
  PyObject* object_;
  bool optional_;
};

template <typename T>
struct Field {
  PyObject* name;
  T& to;
  bool optional;
};

template <typename T>
Field<T> field(PyObject* name, T& to, bool optional = false) {
  return {name, to, optional};
}

// A string that is looked up by its address; it lives as long as the process.
#define COLLAVO_NAME(name)                                               \
  [] {                                                                   \
    static PyObject* const interned = PyUnicode_InternFromString(#name); \
    return interned;                                                     \
  }()
#define ARGUMENT(variable) field(COLLAVO_NAME(variable), variable)
#define FIELD(member) field(COLLAVO_NAME(member), to.member)
// A tensor that may be None.
#define FIELD_OR_NONE(member) field(COLLAVO_NAME(member), to.member, true)

// A function's arguments, or the dict that one of them is.
class Fields {
 public:
  Fields(const char* function, PyObject* values) : path_{function}, values_(values) {}
  Fields(const Fields& outer, PyObject* name, PyObject* values)
      : path_{outer.path_.function, &outer, name}, values_(values) {}

  // Reads all of them; there must be no others.
  template <typename... T>
  void read(const Field<T>&... fields) const {
    (load(Value(*this, fields.name, find(fields.name), fields.optional), fields.to), ...);
    if (PyDict_GET_SIZE(values_) != static_cast<Py_ssize_t>(sizeof...(T))) {
      unknown({fields.name...});
    }
  }

  [[noreturn]] void fail(PyObject* name, const std::string& what) const {
    throw pybind11::type_error(std::string(path_.function) + ": " + full(name) + ": " + what);
  }

 private:
  struct Path {
    const char* function;
    const Fields* outer = nullptr;
    PyObject* name = nullptr;
  };

  PyObject* find(PyObject* name) const {
    PyObject* found = PyDict_GetItemWithError(values_, name);
    if (!found) fail(name, "the argument is missing");
    return found;
  }

  [[noreturn]] void unknown(const std::vector<PyObject*>& known) const {
    std::string names;
    for (PyObject* name : known) names += (names.empty() ? "" : ", ") + text(name);
    for (const auto& item : pybind11::reinterpret_borrow<pybind11::dict>(values_)) {
      bool is_known = false;
      for (PyObject* name : known) is_known |= item.first.equal(pybind11::handle(name));
      if (!is_known) fail(item.first.ptr(), "there is no such argument; expected " + names);
    }
    throw pybind11::type_error(std::string(path_.function) + ": expected " + names);
  }

  std::string full(PyObject* name) const {
    return path_.outer ? path_.outer->full(path_.name) + "." + text(name) : text(name);
  }

  static std::string text(PyObject* name) { return pybind11::str(pybind11::handle(name)); }

  Path path_;
  PyObject* values_;
};

inline void Value::wrong(const char* expected) const {
  PyErr_Clear();
  in_.fail(name_, std::string("expected ") + expected + ", got " + Py_TYPE(object_)->tp_name);
}

inline int64_t Value::integer() const {
  if (!PyLong_Check(object_) || PyBool_Check(object_)) wrong("an int");
  const long long value = PyLong_AsLongLong(object_);
  if (value == -1 && PyErr_Occurred()) wrong("an int of 64 bits");
  return value;
}

inline bool Value::boolean() const {
  if (!PyBool_Check(object_)) wrong("a bool");
  return object_ == Py_True;
}

inline double Value::number() const {
  if (!PyFloat_Check(object_) && !PyLong_Check(object_)) wrong("a float");
  const double value = PyFloat_AsDouble(object_);
  if (value == -1 && PyErr_Occurred()) wrong("a float");
  return value;
}

inline bool Value::absent() const {
  return optional_ && object_ == Py_None;
}

inline PyObject* Value::call(PyObject* method) const {
  PyObject* result = PyObject_CallMethodNoArgs(object_, method);
  if (!result) wrong(optional_ ? "a tensor or None" : "a tensor");
  return result;
}

inline void* Value::address() const {
  if (absent()) return nullptr;
  PyObject* number = call(COLLAVO_NAME(data_ptr));
  void* address = PyLong_AsVoidPtr(number);
  Py_DECREF(number);
  if (!address && PyErr_Occurred()) wrong("a tensor");
  return address;
}

template <size_t kDimensions>
void Value::strides(int64_t (&to)[kDimensions]) const {
  const auto found = pybind11::reinterpret_steal<pybind11::object>(call(COLLAVO_NAME(stride)));
  if (!PyTuple_Check(found.ptr()) || PyTuple_GET_SIZE(found.ptr()) != kDimensions) {
    in_.fail(name_, "expected " + std::to_string(kDimensions) + " dimensions");
  }
  for (size_t i = 0; i < kDimensions; ++i) {
    to[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(found.ptr(), i));
  }
  if (PyErr_Occurred()) wrong("a tensor");
}

inline Fields Value::fields() const {
  if (!PyDict_Check(object_)) wrong("a dict");
  return Fields(in_, name_, object_);
}

// What a field's type makes of a value. Structs have such a function beside their binding.
inline void load(const Value& value, int64_t& to) {
  to = value.integer();
}
inline void load(const Value& value, int& to) {
  to = static_cast<int>(value.integer());
}
inline void load(const Value& value, bool& to) {
  to = value.boolean();
}
inline void load(const Value& value, float& to) {
  to = static_cast<float>(value.number());
}
inline void load(const Value& value, DType& to) {
  const int64_t code = value.integer();
  if (code < 0 || code > static_cast<int64_t>(DType::float16)) value.wrong("a dtype's code");
  to = static_cast<DType>(code);
}
template <typename T>
void load(const Value& value, T*& to) {
  to = static_cast<T*>(value.address());
}
template <typename T>
void load(const Value& value, std::vector<T>& to) {
  if (!PyList_Check(value.object())) value.wrong("a list");
  to.resize(static_cast<size_t>(PyList_GET_SIZE(value.object())));
  for (size_t i = 0; i < to.size(); ++i) {
    load(value.item(static_cast<Py_ssize_t>(i)), to[i]);
  }
}

// Python's function that gives memory for a number of bytes, and the memory it gave, which lives as
// long as this does.
class Allocator {
 public:
  void* take(int64_t bytes) {
    memory_ = pybind11::handle(function_)(bytes);
    const auto address = pybind11::reinterpret_steal<pybind11::object>(
        PyObject_CallMethodNoArgs(memory_.ptr(), COLLAVO_NAME(data_ptr)));
    if (!address) throw pybind11::error_already_set();
    return PyLong_AsVoidPtr(address.ptr());
  }

 private:
  friend void load(const Value& value, Allocator& to);

  PyObject* function_ = nullptr;
  pybind11::object memory_;
};

inline void load(const Value& value, Allocator& to) {
  if (!PyCallable_Check(value.object())) value.wrong("a function");
  to.function_ = value.object();
}

}  // namespace collavo
