//! The device code that this library carries, and what is known of it.

/// A kernel: one `KERNEL(name, ..)` line of `kernels/`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// Entry name.
    pub name: &'static str,
    /// The file that declares it, as `kernels/gelu.cu`.
    pub file: &'static str,
    /// Declared with `HOT_KERNEL`: may not spill registers.
    pub hot: bool,
    /// FNV-1a of the file and the headers it includes: by it a measurement names the source that it was made with.
    pub hash: u64,
}

/// One embedded file, aligned: the driver may read a fatbin in place, by words.
#[allow(unused_macros, reason = "a build without nvcc embeds none")]
macro_rules! fatbin {
    ($path:literal) => {{
        #[repr(align(16))]
        struct Aligned<T: ?Sized>(T);
        static FATBIN: &Aligned<[u8]> = &Aligned(*include_bytes!($path));
        &FATBIN.0
    }};
}

// `FATBINS`, `RESOURCES` and `KERNELS`, written by build.rs.
include!(concat!(env!("OUT_DIR"), "/kernels.rs"));
