//! The layer on a GPU: products by the driver; GELU and column sums by kernels, or by epilogues of the products.

use std::mem::offset_of;

use super::{Backward, Dims, Epilogue, Forward, GradInput};
use crate::cuda::{self, DevPtr, Gpu, Matmul, Matrix};
use crate::ops::gelu;
use crate::tensor::carve_bytes;
use crate::{DType, Result, TensorMut, TensorRef};

/// A matrix with nothing between its rows.
pub(in crate::ops) fn dense(ptr: DevPtr, dtype: DType, cols: usize) -> Matrix {
    Matrix { ptr, dtype, row_stride: cols, batch_stride: 0, transposed: false }
}

pub(in crate::ops) fn transposed(matrix: Matrix) -> Matrix {
    Matrix { transposed: true, ..matrix }
}

/// Whether GELU is an epilogue of the products around it. Forward and backward agree, and so do all layers of a dtype.
fn gelu_in_products(gpu: &Gpu, dtype: DType) -> bool {
    dtype == DType::Bf16 && gpu.driver().epilogues().gelu
}

pub(super) fn forward(gpu: &Gpu, args: Forward<'_>, dims: Dims) -> Result<()> {
    let Dims { rows, inputs, outputs, dtype } = dims;
    let out = args.out.dev_ptr();
    let (product, add, epilogue) = match &args.epilogue {
        Epilogue::None => (out, None, cuda::Epilogue::None),
        Epilogue::Residual(residual) => (out, Some(residual.dev_ptr()), cuda::Epilogue::None),
        Epilogue::Gelu(pre) if gelu_in_products(gpu, dtype) => {
            (out, None, cuda::Epilogue::Gelu(pre.dev_ptr()))
        }
        Epilogue::Gelu(pre) => (pre.dev_ptr(), None, cuda::Epilogue::None),
    };
    gpu.driver().matmul(&Matmul {
        m: rows,
        n: outputs,
        k: inputs,
        batch: 1,
        a: dense(args.inp.dev_ptr(), dtype, inputs),
        b: transposed(dense(args.weight.dev_ptr(), dtype, inputs)),
        out: dense(product, dtype, outputs),
        bias: Some(args.bias.dev_ptr()),
        add,
        epilogue,
    })?;
    match &args.epilogue {
        Epilogue::Gelu(pre) if epilogue == cuda::Epilogue::None => {
            gelu::launch::forward(gpu, dtype, out, pre.dev_ptr(), rows * outputs)
        }
        _ => Ok(()),
    }
}

pub(super) fn backward(gpu: &Gpu, args: Backward<'_>, dims: Dims) -> Result<()> {
    let Dims { rows, inputs, outputs, dtype } = dims;
    let grad_out = dense(args.grad_out.dev_ptr(), dtype, outputs);
    let grad_weight = args.grad_weight.dev_ptr();
    let product = Matmul {
        m: outputs,
        n: inputs,
        k: rows,
        batch: 1,
        a: transposed(grad_out),
        b: dense(args.inp.dev_ptr(), dtype, inputs),
        out: dense(grad_weight, DType::F32, inputs),
        bias: None,
        add: Some(grad_weight),
        epilogue: cuda::Epilogue::None,
    };
    let mut workspace = args.workspace;
    let (sums, _) = workspace.reborrow().carve_tensor(DType::F32, outputs);
    let sums = sums.dev_ptr();
    let with_sums = Matmul { epilogue: cuda::Epilogue::RowSums(sums), ..product };
    if gpu.driver().epilogues().bias && gpu.driver().offers(&with_sums)? {
        gpu.driver().matmul(&with_sums)?;
        // The epilogue overwrites, a gradient accumulates.
        add_partials(gpu, [args.grad_bias.dev_ptr(), DevPtr(0)], outputs, sums, 1)?;
    } else {
        gpu.driver().matmul(&product)?;
        add_column_sums(gpu, args.grad_bias, args.grad_out, workspace)?;
    }
    let (grad, pre) = match &args.grad_inp {
        GradInput::None => return Ok(()),
        GradInput::Plain(grad) => (grad.dev_ptr(), None),
        GradInput::Gelu { grad, pre } => (grad.dev_ptr(), Some(pre.dev_ptr())),
    };
    let epilogue = match pre {
        Some(pre) if gelu_in_products(gpu, dtype) => cuda::Epilogue::GeluSlope(pre),
        _ => cuda::Epilogue::None,
    };
    gpu.driver().matmul(&Matmul {
        m: rows,
        n: inputs,
        k: outputs,
        batch: 1,
        a: grad_out,
        b: dense(args.weight.dev_ptr(), dtype, inputs),
        out: dense(grad, dtype, inputs),
        bias: None,
        add: None,
        epilogue,
    })?;
    match pre {
        Some(pre) if epilogue == cuda::Epilogue::None => {
            gelu::launch::backward(gpu, dtype, grad, grad, pre, rows * inputs)
        }
        _ => Ok(()),
    }
}

/// As `LinearColumnSums` in `kernels/linear.cu`.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct ColumnSums {
    partials: DevPtr,
    inp: DevPtr,
    rows: i64,
    slab_rows: i64,
    columns: i32,
    stripes: i32,
}
const _: () = assert!(size_of::<ColumnSums>() == 40 && offset_of!(ColumnSums, stripes) == 36);

/// As `LinearAddPartials` in `kernels/linear.cu`.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct AddPartials {
    sums: DevPtr,
    more_sums: DevPtr,
    partials: DevPtr,
    count: i32,
    columns: i32,
}
const _: () = assert!(size_of::<AddPartials>() == 32 && offset_of!(AddPartials, columns) == 28);

/// Blocks that an H200 holds at once: four on each of its 132 multiprocessors.
const BLOCKS: usize = 132 * 4;
/// Columns of a block in bf16.
const STRIPE: usize = 256;
/// Rows that a block reads before it adds: four in each of its eight warps.
const LEAST_ROWS: usize = 32;

/// Rows of a slab, and slabs. A function of the shape alone, on every GPU, and so is the order of the sums.
fn slabs(rows: usize, columns: usize) -> (usize, usize) {
    let most = (BLOCKS / columns.div_ceil(STRIPE)).max(1);
    let slab_rows = rows.div_ceil(most).max(LEAST_ROWS);
    (slab_rows, rows.div_ceil(slab_rows))
}

/// Bytes of workspace that [`add_column_sums`] needs, or a few more: fewer rows or columns never need more.
pub(in crate::ops) fn workspace_bytes(rows: usize, columns: usize) -> usize {
    let most = (rows.div_ceil(LEAST_ROWS) * columns).min((BLOCKS * STRIPE).max(columns));
    carve_bytes(DType::F32, most)
}

/// `sums (N) += ` the sum of the rows of `inp`, seen as `(R, N)`: sums in f32, `inp` f32 or bf16, N a multiple of 4.
pub(in crate::ops) fn add_column_sums(
    gpu: &Gpu,
    sums: TensorMut<'_>,
    inp: TensorRef<'_>,
    workspace: TensorMut<'_>,
) -> Result<()> {
    let columns = sums.elems();
    let rows = inp.elems() / columns;
    let (slab_rows, slabs) = slabs(rows, columns);
    let (partials, _) = workspace.carve_tensor(DType::F32, slabs * columns);
    let (kernel, stripe) = match inp.dtype() {
        DType::Bf16 if columns.is_multiple_of(8) => ("linear_column_sums_bf16", 256),
        DType::Bf16 => ("linear_column_sums_bf16_by_4", 128),
        _ => ("linear_column_sums_f32", 128),
    };
    let stripes = columns.div_ceil(stripe);
    let params = ColumnSums {
        partials: partials.dev_ptr(),
        inp: inp.dev_ptr(),
        rows: rows as i64,
        slab_rows: slab_rows as i64,
        columns: columns as i32,
        stripes: stripes as i32,
    };
    gpu.launch(kernel, slabs * stripes, 256, 0, &params)?;
    add_partials(gpu, [sums.dev_ptr(), DevPtr(0)], columns, partials.dev_ptr(), slabs)
}

/// `sums += ` the sum of `count` rows of `partials`, in a fixed order. A row is one vector of `columns` f32 for each of the
/// sums, of which the second may be none.
pub(in crate::ops) fn add_partials(
    gpu: &Gpu,
    [sums, more_sums]: [DevPtr; 2],
    columns: usize,
    partials: DevPtr,
    count: usize,
) -> Result<()> {
    let all = if more_sums == DevPtr(0) { columns } else { 2 * columns };
    let (count, columns) = (count as i32, columns as i32);
    let params = AddPartials { sums, more_sums, partials, count, columns };
    gpu.launch("linear_add_partials", all.div_ceil(32), 512, 0, &params)
}
