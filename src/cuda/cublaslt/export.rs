//! Plans as bytes, so that a resumed run multiplies with the same algorithms and gets the same bits.
//!
//! Layout: a magic line; the length of the identity as 4 bytes and the identity (GPU, driver, cublasLt); then for each plan
//! its [`Problem`] and [`Algorithm`], or zeros and an arithmetic of all ones where cublasLt had none. Integers are
//! little-endian.

use std::collections::BTreeMap;

use super::descriptors::{Algorithm, arithmetics};
use super::problem::{Extra, Problem};

const MAGIC: &[u8] = b"pixmim matmul plans 2\n";

/// Plans by what they are for. None: cublasLt had no algorithm, and the product was done in another way.
pub(super) type Pinned = BTreeMap<Problem, Option<Algorithm>>;

/// In place of an arithmetic: there is no algorithm.
const NO_ALGORITHM: u64 = u64::MAX;

#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct Entry {
    problem: Problem,
    words: [u64; 8],
    workspace_bytes: u64,
    arithmetic: u64,
}

/// The bytes of these plans of the machine with this identity.
pub(super) fn write(identity: &str, plans: &Pinned) -> Vec<u8> {
    let mut bytes = MAGIC.to_vec();
    bytes.extend((identity.len() as u32).to_le_bytes());
    bytes.extend(identity.as_bytes());
    for (problem, algorithm) in plans {
        let none = Algorithm { words: [0; 8], workspace_bytes: 0, arithmetic: NO_ALGORITHM };
        let Algorithm { words, workspace_bytes, arithmetic } = algorithm.unwrap_or(none);
        let entry = Entry { problem: *problem, words, workspace_bytes, arithmetic };
        bytes.extend(bytemuck::bytes_of(&entry));
    }
    bytes
}

/// The plans in these bytes, or why they cannot be used on the machine with this identity.
pub(super) fn read(bytes: &[u8], identity: &str, workspace_bytes: u64) -> Result<Pinned, String> {
    let damaged = || "they are damaged, or of another version of pixmim".to_owned();
    let rest = bytes.strip_prefix(MAGIC).ok_or_else(damaged)?;
    let (length, rest) = rest.split_first_chunk().ok_or_else(damaged)?;
    let length = u32::from_le_bytes(*length) as usize;
    let (theirs, rest) = rest.split_at_checked(length).ok_or_else(damaged)?;
    if theirs != identity.as_bytes() {
        let theirs = String::from_utf8_lossy(theirs);
        return Err(format!("they are for {theirs}, this is {identity}"));
    }
    let (entries, []) = rest.as_chunks::<{ size_of::<Entry>() }>() else {
        return Err(damaged());
    };
    let read = |bytes: &[u8; size_of::<Entry>()]| {
        let entry: Entry = bytemuck::pod_read_unaligned(bytes);
        let Entry { problem, words, workspace_bytes: needs, arithmetic } = entry;
        if arithmetic == NO_ALGORITHM {
            return (problem.extra() == Extra::RowSums).then_some((problem, None));
        }
        let fits =
            needs <= workspace_bytes && arithmetic < arithmetics(problem.factors()).len() as u64;
        let algorithm = Algorithm { words, workspace_bytes: needs, arithmetic };
        fits.then_some((problem, Some(algorithm)))
    };
    entries.iter().map(read).collect::<Option<_>>().ok_or_else(damaged)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType;
    use crate::cuda::driver::{DevPtr, Epilogue, Matmul, Matrix};

    const HERE: &str = "NVIDIA H200, driver 13000, cublasLt 130100";

    fn plans() -> Pinned {
        let matrix = |dtype, row_stride| Matrix {
            ptr: DevPtr(256),
            dtype,
            row_stride,
            batch_stride: 0,
            transposed: false,
        };
        let plan = |m: usize, dtype, epilogue, arithmetic: Option<u64>| {
            let matmul = Matmul {
                m,
                n: 5,
                k: 3,
                batch: 1,
                a: matrix(dtype, 3),
                b: matrix(dtype, 5),
                out: matrix(DType::F32, 5),
                bias: None,
                add: None,
                epilogue,
            };
            let words = std::array::from_fn(|i| (m * 100 + i) as u64);
            let algorithm = |arithmetic| Algorithm { words, workspace_bytes: m as u64, arithmetic };
            (Problem::new(&matmul).unwrap(), arithmetic.map(algorithm))
        };
        let sums = Epilogue::RowSums(DevPtr(256));
        [
            plan(7, DType::F32, Epilogue::None, Some(1)),
            plan(2, DType::Bf16, Epilogue::None, Some(0)),
            plan(2, DType::Bf16, sums, Some(0)),
            plan(3, DType::Bf16, sums, None),
        ]
        .into()
    }

    #[test]
    fn what_is_read_is_what_was_written() {
        let bytes = write(HERE, &plans());
        assert_eq!(read(&bytes, HERE, 1 << 20).unwrap(), plans());
        assert_eq!(write(HERE, &read(&bytes, HERE, 1 << 20).unwrap()), bytes);
        assert_eq!(read(&write(HERE, &Pinned::new()), HERE, 0).unwrap(), Pinned::new());
    }

    #[test]
    fn plans_of_another_gpu_or_version_are_refused_with_both_names() {
        for theirs in [
            "NVIDIA H100, driver 13000, cublasLt 130100",
            "NVIDIA H200, driver 13000, cublasLt 130200",
            "NVIDIA H200, driver 13010, cublasLt 130100",
        ] {
            let why = read(&write(theirs, &plans()), HERE, 1 << 20).unwrap_err();
            assert!(why.contains(theirs) && why.contains(HERE), "{why}");
        }
    }

    #[test]
    fn damaged_plans_are_refused() {
        let bytes = write(HERE, &plans());
        for cut in 0..bytes.len() {
            let whole = (bytes.len() - cut).is_multiple_of(size_of::<Entry>())
                && cut > MAGIC.len() + HERE.len();
            assert!(whole || read(&bytes[..cut], HERE, 1 << 20).is_err(), "cut at {cut}");
        }
        let mut other = bytes.clone();
        other[MAGIC.len() - 2] = b'1';
        assert!(read(&other, HERE, 1 << 20).unwrap_err().contains("damaged"));
        // Workspace that is not there, and arithmetic that does not exist.
        assert!(read(&bytes, HERE, 6).is_err());
        let mut bytes = bytes;
        let last = bytes.len() - 8;
        bytes[last] = 9;
        assert!(read(&bytes, HERE, 1 << 20).is_err());
        // Only sums of rows can be done in another way.
        bytes[last..].fill(0xFF);
        assert!(read(&bytes, HERE, 1 << 20).is_err());
    }
}
