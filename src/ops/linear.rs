//! A fully connected layer with its epilogues: bias, exact GELU, residual.
//!
//! `out = inp weight^T + bias`, then `gelu(..)` or `residual + ..`.

use super::cost::{self, Cost};
use super::{expect_multiple, expect_nonzero, for_real};
use crate::device::Call;
use crate::tensor::expect_workspace;
use crate::{DType, Device, Result, TensorMut, TensorRef};

pub(in crate::ops) mod launch;

/// What happens to the product and its bias.
#[derive(Debug)]
pub enum Epilogue<'a> {
    /// Nothing.
    None,
    /// GELU; its input is kept for the backward pass: `(R, N)`. Overwritten.
    Gelu(TensorMut<'a>),
    /// This is added: `(R, N)`.
    Residual(TensorRef<'a>),
}

/// Arguments of [`forward`]. Leading dimensions count as rows: `(B, T, K)` is taken as `(R, K)` with `R = B T`.
#[derive(Debug)]
pub struct Forward<'a> {
    /// `(R, N)`. Overwritten.
    pub out: TensorMut<'a>,
    /// `(R, K)`.
    pub inp: TensorRef<'a>,
    /// `(N, K)`.
    pub weight: TensorRef<'a>,
    /// `(N)`.
    pub bias: TensorRef<'a>,
    /// What happens to the product and its bias.
    pub epilogue: Epilogue<'a>,
}

/// The gradient of a layer's input.
#[derive(Debug)]
pub enum GradInput<'a> {
    /// Not wanted.
    None,
    /// `(R, K)`. Overwritten.
    Plain(TensorMut<'a>),
    /// Multiplied by GELU's slope at `pre`: the layer's input was `gelu(pre)`, and this is the gradient of `pre`.
    Gelu {
        /// `(R, K)`. Overwritten.
        grad: TensorMut<'a>,
        /// `(R, K)`, as kept by the layer before.
        pre: TensorRef<'a>,
    },
}

/// Arguments of [`backward`].
#[derive(Debug)]
pub struct Backward<'a> {
    /// Gradient of the input.
    pub grad_inp: GradInput<'a>,
    /// `(N, K)`. Accumulates.
    pub grad_weight: TensorMut<'a>,
    /// `(N)`. Accumulates.
    pub grad_bias: TensorMut<'a>,
    /// `(R, N)`, gradient of the product and its bias.
    pub grad_out: TensorRef<'a>,
    /// `(R, K)`, as given to [`forward`].
    pub inp: TensorRef<'a>,
    /// `(N, K)`.
    pub weight: TensorRef<'a>,
    /// At least [`workspace_bytes`].
    pub workspace: TensorMut<'a>,
}

/// Bytes of workspace that [`backward`] needs for `rows` (R) of `outputs` (N) numbers.
#[must_use]
pub fn workspace_bytes(dev: &Device, rows: usize, outputs: usize) -> usize {
    match dev {
        Device::Cpu(_) => 0,
        Device::Cuda(_) => launch::workspace_bytes(rows, outputs),
    }
}

/// `out = epilogue(inp weight^T + bias)`.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape) or [`Error::DType`](crate::Error::DType) unless the arguments are as their
/// fields say.
pub fn forward(dev: &Device, args: Forward<'_>) -> Result<()> {
    let dims = args.check(dev)?;
    let _span = dev.span("linear::forward", || args.cost(dims));
    match dev {
        Device::Cpu(cpu) => for_real!(dims.dtype, T => cpu::forward::<T>(args, dims, *cpu)),
        Device::Cuda(gpu) => launch::forward(gpu, args, dims)?,
    }
    Ok(())
}

/// `grad_inp = grad_out weight`, `grad_weight += grad_out^T inp`, `grad_bias += ` sum of the rows of `grad_out`.
///
/// # Errors
/// As [`forward`].
pub fn backward(dev: &Device, args: Backward<'_>) -> Result<()> {
    let dims = args.check(dev)?;
    let _span = dev.span("linear::backward", || args.cost(dims));
    match dev {
        Device::Cpu(cpu) => for_real!(dims.dtype, T => cpu::backward::<T>(args, dims, *cpu)),
        Device::Cuda(gpu) => launch::backward(gpu, args, dims)?,
    }
    Ok(())
}

/// Refuses a tensor that is not `rows` rows of the given width, whatever its leading dimensions.
macro_rules! expect_rows {
    ($tensor:expr, $call:expr, $arg:expr, $dims:expr, $width:ident) => {
        let (shape, width) = ($tensor.shape(), $dims.$width);
        $tensor.expect($call, $arg, $dims.dtype, shape)?;
        if shape.last() != Some(&width) || $tensor.elems() != $dims.rows * width {
            return Err(crate::Error::Shape {
                op: $call.op,
                arg: $arg,
                expected: format!("[.., {width}] of {} rows", $dims.rows),
                found: shape.to_vec(),
            });
        }
    };
}

#[derive(Clone, Copy)]
struct Dims {
    rows: usize,
    inputs: usize,
    outputs: usize,
    dtype: DType,
}

fn dims(call: Call<'_>, inp: &TensorRef<'_>, weight: &TensorRef<'_>) -> Result<Dims> {
    let dtype = inp.expect_real(call, "inp")?;
    let [outputs, inputs] = weight.dims(call, "weight", "(N, K)")?;
    weight.expect(call, "weight", dtype, &[outputs, inputs])?;
    expect_nonzero(call, "weight", weight.shape())?;
    expect_nonzero(call, "inp", inp.shape())?;
    let dims = Dims { rows: inp.elems() / inputs, inputs, outputs, dtype };
    expect_rows!(inp, call, "inp", dims, inputs);
    expect_multiple(call, "weight", &[outputs, inputs], 4)?;
    expect_multiple(call, "weight.T", &[inputs, outputs], 4)?;
    Ok(dims)
}

impl Forward<'_> {
    fn cost(&self, Dims { rows, inputs, outputs, dtype }: Dims) -> Cost {
        let epilogue = !matches!(self.epilogue, Epilogue::None);
        cost::linear_forward(dtype, [rows, inputs, outputs], epilogue)
    }

    fn check(&self, dev: &Device) -> Result<Dims> {
        let call = Call { op: "linear::forward", dev };
        let dims = dims(call, &self.inp, &self.weight)?;
        expect_rows!(self.out, call, "out", dims, outputs);
        self.bias.expect(call, "bias", dims.dtype, &[dims.outputs])?;
        match &self.epilogue {
            Epilogue::None => {}
            Epilogue::Gelu(pre) => {
                expect_rows!(pre, call, "epilogue.pre", dims, outputs);
            }
            Epilogue::Residual(residual) => {
                expect_rows!(residual, call, "epilogue.residual", dims, outputs);
            }
        }
        Ok(dims)
    }
}

impl Backward<'_> {
    fn cost(&self, Dims { rows, inputs, outputs, dtype }: Dims) -> Cost {
        let shape = [rows, inputs, outputs];
        match self.grad_inp {
            GradInput::None => cost::linear_backward_parameters(dtype, shape),
            GradInput::Plain(_) => cost::linear_backward(dtype, shape, false),
            GradInput::Gelu { .. } => cost::linear_backward(dtype, shape, true),
        }
    }

    fn check(&self, dev: &Device) -> Result<Dims> {
        let call = Call { op: "linear::backward", dev };
        let dims = dims(call, &self.inp, &self.weight)?;
        expect_rows!(self.grad_out, call, "grad_out", dims, outputs);
        self.grad_weight.expect(call, "grad_weight", dims.dtype.wide(), self.weight.shape())?;
        self.grad_bias.expect(call, "grad_bias", dims.dtype.wide(), &[dims.outputs])?;
        match &self.grad_inp {
            GradInput::None => {}
            GradInput::Plain(grad) => {
                expect_rows!(grad, call, "grad_inp", dims, inputs);
            }
            GradInput::Gelu { grad, pre } => {
                expect_rows!(grad, call, "grad_inp.grad", dims, inputs);
                expect_rows!(pre, call, "grad_inp.pre", dims, inputs);
            }
        }
        expect_workspace(call, &self.workspace, workspace_bytes(dev, dims.rows, dims.outputs))?;
        Ok(dims)
    }
}

pub(super) mod cpu {
    use rayon::prelude::*;

    use super::{Backward, Dims, Epilogue, Forward, GradInput};
    use crate::Cpu;
    use crate::cpu::gemm::{Mat, MatMut, matmul};
    use crate::cpu::{Real, rows_per_task, simd};
    use crate::scalar::{gelu, gelu_slope};

    pub(super) fn forward<T: Real>(args: Forward<'_>, dims: Dims, cpu: Cpu) {
        let Dims { rows, inputs, outputs, .. } = dims;
        let product = |dst: &mut [T], accumulate| {
            let lhs = Mat::new(args.inp.as_slice::<T>(), rows, inputs);
            let rhs = Mat::new(args.weight.as_slice::<T>(), outputs, inputs).t();
            matmul(MatMut::new(dst, rows, outputs), lhs, rhs, accumulate, cpu.products);
        };
        let bias = args.bias.as_slice::<T>();
        let out = args.out.into_slice::<T>();
        let piece = rows_per_task(outputs) * outputs;
        match args.epilogue {
            Epilogue::None => {
                out.par_chunks_mut(piece).for_each(|rows| {
                    rows.chunks_exact_mut(outputs).for_each(|row| row.copy_from_slice(bias));
                });
                product(out, true);
            }
            Epilogue::Residual(residual) => {
                let residual = residual.as_slice::<T>();
                out.par_chunks_mut(piece).zip(residual.par_chunks(piece)).for_each(|(out, x)| {
                    simd!(|| {
                        let rows = out.chunks_exact_mut(outputs).zip(x.chunks_exact(outputs));
                        for (out, x) in rows {
                            for ((y, &x), &bias) in out.iter_mut().zip(x).zip(bias) {
                                *y = x + bias;
                            }
                        }
                    });
                });
                product(out, true);
            }
            Epilogue::Gelu(pre) => {
                let pre = pre.into_slice::<T>();
                product(pre, false);
                out.par_chunks_mut(piece).zip(pre.par_chunks_mut(piece)).for_each(|(out, pre)| {
                    simd!(|| {
                        let rows = out.chunks_exact_mut(outputs);
                        for (out, pre) in rows.zip(pre.chunks_exact_mut(outputs)) {
                            for ((y, x), &bias) in out.iter_mut().zip(pre).zip(bias) {
                                *x = *x + bias;
                                *y = gelu(*x);
                            }
                        }
                    });
                });
            }
        }
    }

    pub(super) fn backward<T: Real>(args: Backward<'_>, dims: Dims, cpu: Cpu) {
        let Dims { rows, inputs, outputs, .. } = dims;
        let grad_out = args.grad_out.as_slice::<T>();
        let grad_rows = Mat::new(grad_out, rows, outputs);
        let grad_weight = MatMut::new(args.grad_weight.into_slice::<T>(), outputs, inputs);
        let inp = Mat::new(args.inp.as_slice::<T>(), rows, inputs);
        matmul(grad_weight, grad_rows.t(), inp, true, cpu.products);
        add_row_sums(args.grad_bias.into_slice(), grad_out);
        let (grad, pre) = match args.grad_inp {
            GradInput::None => return,
            GradInput::Plain(grad) => (grad.into_slice::<T>(), None),
            GradInput::Gelu { grad, pre } => (grad.into_slice::<T>(), Some(pre.as_slice::<T>())),
        };
        let weight = Mat::new(args.weight.as_slice::<T>(), outputs, inputs);
        matmul(MatMut::new(grad, rows, inputs), grad_rows, weight, false, cpu.products);
        if let Some(pre) = pre {
            let piece = rows_per_task(inputs) * inputs;
            grad.par_chunks_mut(piece).zip(pre.par_chunks(piece)).for_each(|(grad, pre)| {
                simd!(|| {
                    for (grad, &x) in grad.iter_mut().zip(pre) {
                        *grad = *grad * gelu_slope(x);
                    }
                });
            });
        }
    }

    /// `sums += ` the sum of the rows, from first to last. Threads take columns, so the order is always the same.
    pub(in crate::ops) fn add_row_sums<T: Real>(sums: &mut [T], rows: &[T]) {
        /// Columns of a piece of work: four cache lines of f32.
        const COLS: usize = 64;
        let width = sums.len();
        sums.par_chunks_mut(COLS).enumerate().for_each(|(i, sums)| {
            simd!(|| {
                for row in rows.chunks_exact(width) {
                    for (sum, &x) in sums.iter_mut().zip(&row[i * COLS..]) {
                        *sum = *sum + x;
                    }
                }
            });
        });
    }
}
