//! The host executor as a driver: kernels run to their end at the launch, products on the CPU.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::sync::Mutex;

use half::bf16;

use super::driver::{DevPtr, Driver, Graph, Launch, Matmul, Matrix, Properties};
use crate::cpu::gemm::{Mat, MatMut, matmul};
use crate::{DType, Error, Products, Result};
