//! cublasLt's objects as Rust values, and its calls.

use std::ffi::c_void;
use std::ptr;

use cudarc::cublaslt::sys;

use super::Lane;
use super::problem::{Operand, Problem};
use crate::{DType, Error, Result};

/// What this file calls.
pub(super) const SYMBOLS: [&str; 15] = [
    "cublasLtCreate",
    "cublasLtDestroy",
    "cublasLtGetVersion",
    "cublasLtMatmul",
    "cublasLtMatmulAlgoCheck",
    "cublasLtMatmulAlgoGetHeuristic",
    "cublasLtMatmulDescCreate",
    "cublasLtMatmulDescDestroy",
    "cublasLtMatmulDescSetAttribute",
    "cublasLtMatmulPreferenceCreate",
    "cublasLtMatmulPreferenceDestroy",
    "cublasLtMatmulPreferenceSetAttribute",
    "cublasLtMatrixLayoutCreate",
    "cublasLtMatrixLayoutDestroy",
    "cublasLtMatrixLayoutSetAttribute",
];

/// Algorithms asked for.
const CANDIDATES: usize = 32;
/// Partial sums of a split product may only be kept in f32 in the workspace and be summed there in a fixed order: bit 1 is
/// `CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE`. Not in the result as they arrive, and not in bf16.
const REDUCTIONS: u32 = 2;

/// An algorithm, as cublasLt describes it: bytes that mean the same to the same version on the same kind of GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Algorithm {
    pub(super) words: [u64; 8],
    pub(super) workspace_bytes: u64,
    /// Index into [`arithmetics`].
    pub(super) arithmetic: u64,
}

/// How products and sums may be computed, best first. Real f32 in each, never TF32.
pub(super) fn arithmetics(factors: DType) -> &'static [sys::cublasComputeType_t] {
    use sys::cublasComputeType_t as C;
    match factors {
        // Pedantic forbids what an environment variable could switch on; not every epilogue is there for it.
        DType::F32 => &[C::CUBLAS_COMPUTE_32F_PEDANTIC, C::CUBLAS_COMPUTE_32F],
        _ => &[C::CUBLAS_COMPUTE_32F],
    }
}

/// Addresses of a product, in cublasLt's order: A, B, C, D.
#[derive(Clone, Copy, Debug)]
pub(super) struct Addresses {
    pub(super) a: u64,
    pub(super) b: u64,
    pub(super) c: u64,
    pub(super) d: u64,
    /// Of [`Problem::vector`]; 0 without.
    pub(super) vector: u64,
    /// Of the matrix beside D; 0 without.
    pub(super) aux: u64,
}

/// A status as a result.
fn check(action: &'static str, status: sys::cublasStatus_t) -> Result<()> {
    match status {
        sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS => Ok(()),
        _ => Err(Error::Gpu { action, why: format!("cublasLt says {status:?}") }),
    }
}

/// The library on a GPU.
#[derive(Debug)]
pub(super) struct Handle(sys::cublasLtHandle_t);

#[expect(unsafe_code, reason = "a handle is a pointer")]
// SAFETY: cublasLt's functions may be called with a handle from any thread.
unsafe impl Send for Handle {}
#[expect(unsafe_code, reason = "a handle is a pointer")]
// SAFETY: as above, also at the same time: the manual calls the library thread-safe, even with one handle.
unsafe impl Sync for Handle {}

impl Handle {
    #[expect(unsafe_code, reason = "calls into cublasLt")]
    pub(super) fn new() -> Result<Self> {
        let mut handle = ptr::null_mut();
        // SAFETY: the probe found the symbol; a context is current; writes one pointer.
        check("start cublasLt", unsafe { sys::cublasLtCreate(&raw mut handle) })?;
        Ok(Self(handle))
    }

    /// Algorithms for a product that fit the workspace, the most promising first; none if it is not supported.
    #[expect(unsafe_code, reason = "calls into cublasLt")]
    pub(super) fn candidates(
        &self,
        problem: &Problem,
        product: &Product,
        workspace_bytes: u64,
    ) -> Result<Vec<Algorithm>> {
        use sys::cublasLtMatmulPreferenceAttributes_t as P;
        let preference = Preference::new()?;
        preference.set(P::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace_bytes)?;
        preference.set(P::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &REDUCTIONS)?;
        let [a, b, c, d] = problem.alignments();
        preference.set(P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &a)?;
        preference.set(P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &b)?;
        preference.set(P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &c)?;
        preference.set(P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &d)?;

        let mut results = [NO_RESULT; CANDIDATES];
        let mut found = 0;
        // SAFETY: the probe found the symbol; handle, descriptors and preference are alive; writes at most CANDIDATES
        // results, for which there is room, and one int.
        let status = unsafe {
            sys::cublasLtMatmulAlgoGetHeuristic(
                self.0,
                product.operation.0,
                product.a.0,
                product.b.0,
                product.out.0,
                product.out.0,
                preference.0,
                CANDIDATES as i32,
                results.as_mut_ptr(),
                &raw mut found,
            )
        };
        use sys::cublasStatus_t as S;
        // Which of the two says that an epilogue is not there for an arithmetic depends on the version.
        if matches!(status, S::CUBLAS_STATUS_NOT_SUPPORTED | S::CUBLAS_STATUS_INVALID_VALUE) {
            return Ok(Vec::new());
        }
        check("plan a product", status)?;
        let found = usize::try_from(found).unwrap_or(0).min(CANDIDATES);
        let usable = |result: &&sys::cublasLtMatmulHeuristicResult_t| {
            result.state == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS
                && result.workspaceSize as u64 <= workspace_bytes
        };
        let algorithm = |result: &sys::cublasLtMatmulHeuristicResult_t| Algorithm {
            words: result.algo.data,
            workspace_bytes: result.workspaceSize as u64,
            arithmetic: product.arithmetic,
        };
        Ok(results[..found].iter().filter(usable).map(algorithm).collect())
    }

    /// Whether an algorithm can be used for a product, and with no more workspace than it claims.
    #[expect(unsafe_code, reason = "calls into cublasLt")]
    pub(super) fn accepts(&self, product: &Product, algorithm: &Algorithm) -> bool {
        let algo = sys::cublasLtMatmulAlgo_t { data: algorithm.words };
        let mut result = NO_RESULT;
        // SAFETY: the probe found the symbol; handle and descriptors are alive; the algorithm is judged, not run; writes
        // one result.
        let status = unsafe {
            sys::cublasLtMatmulAlgoCheck(
                self.0,
                product.operation.0,
                product.a.0,
                product.b.0,
                product.out.0,
                product.out.0,
                &raw const algo,
                &raw mut result,
            )
        };
        status == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS
            && result.state == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS
            && result.workspaceSize as u64 <= algorithm.workspace_bytes
    }

    /// Enqueues `D = epilogue(op(A) op(B) + beta C)`. Sets the epilogue's addresses in `product`, which therefore is no one
    /// else's for as long.
    #[expect(unsafe_code, reason = "calls into cublasLt")]
    pub(super) fn multiply(
        &self,
        product: &mut Product,
        algorithm: &Algorithm,
        addresses: Addresses,
        beta: f32,
        lane: Lane<'_>,
    ) -> Result<()> {
        let Addresses { a, b, c, d, vector, aux } = addresses;
        product.operation.point(vector, aux)?;
        let alpha = 1.0_f32;
        let algo = sys::cublasLtMatmulAlgo_t { data: algorithm.words };
        let device = |address: u64| ptr::without_provenance::<c_void>(address as usize);
        // SAFETY: the probe found the symbol; handle and descriptors are alive; alpha and beta are f32, which is the
        // scale type of the operation, and are read before the call returns; all other addresses are used by the GPU
        // only. The algorithm passed `candidates` or `accepts` for these descriptors, so a lane's workspace is large enough.
        let status = unsafe {
            sys::cublasLtMatmul(
                self.0,
                product.operation.0,
                (&raw const alpha).cast(),
                device(a),
                product.a.0,
                device(b),
                product.b.0,
                (&raw const beta).cast(),
                device(c),
                product.out.0,
                device(d).cast_mut(),
                product.out.0,
                &raw const algo,
                device(lane.workspace).cast_mut(),
                algorithm.workspace_bytes as usize,
                lane.stream.handle().cast(),
            )
        };
        check("multiply", status)
    }
}

impl Drop for Handle {
    #[expect(unsafe_code, reason = "calls into cublasLt")]
    fn drop(&mut self) {
        // SAFETY: the probe found the symbol; `new` made the handle destroyed here.
        let _ = unsafe { sys::cublasLtDestroy(self.0) };
    }
}

const NO_RESULT: sys::cublasLtMatmulHeuristicResult_t = sys::cublasLtMatmulHeuristicResult_t {
    algo: sys::cublasLtMatmulAlgo_t { data: [0; 8] },
    workspaceSize: 0,
    state: sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED,
    wavesCount: 0.0,
    reserved: [0; 4],
};

/// A product in cublasLt's terms.
#[derive(Debug)]
pub(super) struct Product {
    operation: Operation,
    a: Layout,
    b: Layout,
    /// Of C and D.
    out: Layout,
    arithmetic: u64,
}

impl Product {
    /// `arithmetic` is an index into [`arithmetics`]. Of `address` only the alignment counts: algorithms are chosen by that of
    /// the epilogue's addresses while planning.
    pub(super) fn new(problem: &Problem, arithmetic: usize, address: u64) -> Result<Self> {
        use sys::cublasLtMatmulDescAttributes_t as M;
        let shape = problem.column_major();
        let operation = Operation::new(arithmetics(problem.factors())[arithmetic])?;
        // CUBLAS_OP_N is 0, CUBLAS_OP_T is 1.
        let op = |operand: &Operand| i32::from(operand.transposed);
        operation.set(M::CUBLASLT_MATMUL_DESC_TRANSA, &op(&shape.a))?;
        operation.set(M::CUBLASLT_MATMUL_DESC_TRANSB, &op(&shape.b))?;
        operation.set(M::CUBLASLT_MATMUL_DESC_EPILOGUE, &(problem.epilogue() as u32))?;
        let [mut vector, mut aux] = [0; 2];
        if problem.vector().is_some() {
            let dtype = cuda_dtype(problem.result()) as i32;
            operation.set(M::CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &dtype)?;
            vector = address;
        }
        if problem.has_aux() {
            // Its dtype is D's if it is not set, and may be set for FP8 alone.
            operation.set(M::CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, &shape.out.leading)?;
            aux = address;
        }
        operation.point(vector, aux)?;
        Ok(Self {
            operation,
            a: Layout::new(&shape.a, shape.batch, problem.factors())?,
            b: Layout::new(&shape.b, shape.batch, problem.factors())?,
            out: Layout::new(&shape.out, shape.batch, problem.result())?,
            arithmetic: arithmetic as u64,
        })
    }
}

fn cuda_dtype(dtype: DType) -> sys::cudaDataType_t {
    match dtype {
        DType::Bf16 => sys::cudaDataType_t::CUDA_R_16BF,
        _ => sys::cudaDataType_t::CUDA_R_32F,
    }
}

#[derive(Debug)]
struct Operation(sys::cublasLtMatmulDesc_t);

#[expect(unsafe_code, reason = "a handle is a pointer")]
// SAFETY: cublasLt's functions may be called with a descriptor from any thread.
unsafe impl Send for Operation {}

impl Operation {
    #[expect(unsafe_code, reason = "calls into cublasLt")]
    fn new(arithmetic: sys::cublasComputeType_t) -> Result<Self> {
        let mut operation = ptr::null_mut();
        let scale = sys::cudaDataType_t::CUDA_R_32F;
        // SAFETY: the probe found the symbol; writes one pointer.
        let status =
            unsafe { sys::cublasLtMatmulDescCreate(&raw mut operation, arithmetic, scale) };
        check("describe a product", status)?;
        Ok(Self(operation))
    }

    #[expect(unsafe_code, reason = "calls into cublasLt")]
    fn set<T: bytemuck::Pod>(
        &self,
        attribute: sys::cublasLtMatmulDescAttributes_t,
        value: &T,
    ) -> Result<()> {
        let start = ptr::from_ref(value).cast();
        // SAFETY: the probe found the symbol; the descriptor is alive; reads the bytes of `value`, and refuses a size
        // that is not the attribute's.
        let status = unsafe {
            sys::cublasLtMatmulDescSetAttribute(self.0, attribute, start, size_of::<T>())
        };
        check("describe a product", status)
    }
}

impl Operation {
    /// Sets the addresses of the epilogue that are not 0.
    fn point(&self, vector: u64, aux: u64) -> Result<()> {
        use sys::cublasLtMatmulDescAttributes_t as M;
        if vector != 0 {
            self.set(M::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &vector)?;
        }
        if aux != 0 {
            self.set(M::CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, &aux)?;
        }
        Ok(())
    }
}

impl Drop for Operation {
    #[expect(unsafe_code, reason = "calls into cublasLt")]
    fn drop(&mut self) {
        // SAFETY: the probe found the symbol; `new` made the descriptor destroyed here.
        let _ = unsafe { sys::cublasLtMatmulDescDestroy(self.0) };
    }
}

#[derive(Debug)]
struct Layout(sys::cublasLtMatrixLayout_t);

#[expect(unsafe_code, reason = "a handle is a pointer")]
// SAFETY: cublasLt's functions may be called with a descriptor from any thread.
unsafe impl Send for Layout {}

impl Layout {
    #[expect(unsafe_code, reason = "calls into cublasLt")]
    fn new(operand: &Operand, batch: i32, dtype: DType) -> Result<Self> {
        use sys::cublasLtMatrixLayoutAttribute_t as L;
        let &Operand { rows, cols, leading, batch_stride, .. } = operand;
        let mut layout = ptr::null_mut();
        let dtype = cuda_dtype(dtype);
        // SAFETY: the probe found the symbol; writes one pointer.
        let status =
            unsafe { sys::cublasLtMatrixLayoutCreate(&raw mut layout, dtype, rows, cols, leading) };
        check("describe a matrix", status)?;
        let layout = Self(layout);
        layout.set(L::CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &batch)?;
        layout.set(L::CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &batch_stride)?;
        Ok(layout)
    }

    #[expect(unsafe_code, reason = "calls into cublasLt")]
    fn set<T: bytemuck::Pod>(
        &self,
        attribute: sys::cublasLtMatrixLayoutAttribute_t,
        value: &T,
    ) -> Result<()> {
        let start = ptr::from_ref(value).cast();
        // SAFETY: the probe found the symbol; the descriptor is alive; reads the bytes of `value`, and refuses a size
        // that is not the attribute's.
        let status = unsafe {
            sys::cublasLtMatrixLayoutSetAttribute(self.0, attribute, start, size_of::<T>())
        };
        check("describe a matrix", status)
    }
}

impl Drop for Layout {
    #[expect(unsafe_code, reason = "calls into cublasLt")]
    fn drop(&mut self) {
        // SAFETY: the probe found the symbol; `new` made the descriptor destroyed here.
        let _ = unsafe { sys::cublasLtMatrixLayoutDestroy(self.0) };
    }
}

#[derive(Debug)]
struct Preference(sys::cublasLtMatmulPreference_t);

impl Preference {
    #[expect(unsafe_code, reason = "calls into cublasLt")]
    fn new() -> Result<Self> {
        let mut preference = ptr::null_mut();
        // SAFETY: the probe found the symbol; writes one pointer.
        let status = unsafe { sys::cublasLtMatmulPreferenceCreate(&raw mut preference) };
        check("plan a product", status)?;
        Ok(Self(preference))
    }

    #[expect(unsafe_code, reason = "calls into cublasLt")]
    fn set<T: bytemuck::Pod>(
        &self,
        attribute: sys::cublasLtMatmulPreferenceAttributes_t,
        value: &T,
    ) -> Result<()> {
        let start = ptr::from_ref(value).cast();
        // SAFETY: the probe found the symbol; the preference is alive; reads the bytes of `value`, and refuses a size
        // that is not the attribute's.
        let status = unsafe {
            sys::cublasLtMatmulPreferenceSetAttribute(self.0, attribute, start, size_of::<T>())
        };
        check("plan a product", status)
    }
}

impl Drop for Preference {
    #[expect(unsafe_code, reason = "calls into cublasLt")]
    fn drop(&mut self) {
        // SAFETY: the probe found the symbol; `new` made the preference destroyed here.
        let _ = unsafe { sys::cublasLtMatmulPreferenceDestroy(self.0) };
    }
}
