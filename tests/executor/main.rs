//! The host executor itself: it finds each planted fault, says where it is, and finds none where there is none.
//!
//! The kernels are in `faults.cu`. They are launched through the executor's own interface (`kernels/simt/api.h`), so
//! that each test decides the bytes, the names and the guard pages of its buffers.

#![expect(clippy::unwrap_used, reason = "a call that should succeed and does not is a failed test")]
#![cfg(pixmim_simt)]

mod layouts;

use std::ffi::{CStr, CString, c_char, c_int, c_void};

use half::{bf16, f16};
use pixmim as _; // links the executor

#[expect(unsafe_code, reason = "kernels/simt/api.h")]
mod api {
    use super::*;

    #[repr(C)]
    pub(crate) struct Options {
        pub(crate) seed: u32,
        pub(crate) threads: u32,
        pub(crate) checks: u32,
    }

    unsafe extern "C" {
        pub(crate) fn pixmim_simt_launch(
            kernel: *const c_char,
            params: *const c_void,
            params_bytes: usize,
            grid: u32,
            block: u32,
            shared_bytes: u32,
            options: *const Options,
            text: *mut c_char,
            text_bytes: usize,
        ) -> c_int;
        pub(crate) fn pixmim_simt_alloc(b: usize, name: *const c_char, front: c_int)
        -> *mut c_void;
        pub(crate) fn pixmim_simt_free(memory: *mut c_void);
        pub(crate) fn pixmim_simt_wrote(memory: *mut c_void, bytes: usize);
        pub(crate) fn pixmim_simt_reads(
            memory: *const c_void,
            bytes: usize,
            text: *mut c_char,
            text_bytes: usize,
        ) -> c_int;
    }
}

fn text_of(text: &[c_char; 2048]) -> String {
    let bytes: Vec<u8> = text.iter().map(|&c| c as u8).collect();
    CStr::from_bytes_until_nul(&bytes).unwrap().to_string_lossy().into_owned()
}

/// Floats in the executor's memory.
pub(crate) struct Buffer {
    memory: *mut f32,
    len: usize,
}

impl Buffer {
    /// Never written. The byte after the last one is out of bounds, and so is the one before the first.
    pub(crate) fn new(name: &str, len: usize) -> Self {
        Self::placed(name, len, false)
    }

    fn placed(name: &str, len: usize, front: bool) -> Self {
        let name = CString::new(name).unwrap();
        #[expect(unsafe_code, reason = "the executor's allocator")]
        // SAFETY: the name is a C string, which the executor copies.
        let memory = unsafe { api::pixmim_simt_alloc(4 * len, name.as_ptr(), front.into()) };
        assert!(!memory.is_null());
        Self { memory: memory.cast(), len }
    }

    pub(crate) fn of(name: &str, values: &[f32]) -> Self {
        let buffer = Self::new(name, values.len());
        buffer.write(values);
        buffer
    }

    fn write(&self, values: &[f32]) {
        assert_eq!(values.len(), self.len);
        #[expect(unsafe_code, reason = "device addresses are addresses of this process")]
        // SAFETY: the buffer has `len` floats, as was just asked, and no launch runs on it.
        unsafe {
            self.memory.copy_from_nonoverlapping(values.as_ptr(), self.len);
            api::pixmim_simt_wrote(self.memory.cast(), 4 * self.len);
        }
    }

    /// All floats, or what the executor has against reading them.
    pub(crate) fn read(&self) -> Result<Vec<f32>, String> {
        let mut text = [0; 2048];
        #[expect(unsafe_code, reason = "device addresses are addresses of this process")]
        // SAFETY: the buffer has `len` floats, filled at the allocation; `text` has as many bytes as are said.
        unsafe {
            let bytes = 4 * self.len;
            match api::pixmim_simt_reads(self.memory.cast(), bytes, text.as_mut_ptr(), 2048) {
                0 => Ok(std::slice::from_raw_parts(self.memory, self.len).to_vec()),
                _ => Err(text_of(&text)),
            }
        }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        #[expect(unsafe_code, reason = "the executor's allocator")]
        // SAFETY: it came from `pixmim_simt_alloc` and is given back once.
        unsafe {
            api::pixmim_simt_free(self.memory.cast());
        }
    }
}

/// `FaultParams` of faults.cu.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Params {
    x: *const f32,
    y: *mut f32,
    n: i64,
}

impl Params {
    pub(crate) fn new(x: &Buffer, y: &Buffer, n: i64) -> Self {
        Self { x: x.memory, y: y.memory, n }
    }
}

fn launch_with(
    kernel: &str,
    [grid, block, shared_bytes]: [u32; 3],
    params: Params,
    options: api::Options,
) -> Result<(), String> {
    let (name, mut text) = (CString::new(kernel).unwrap(), [0; 2048]);
    #[expect(unsafe_code, reason = "the executor's interface")]
    // SAFETY: all pointers lead to as many bytes as are said; what the kernel does is checked by the executor.
    let failed = unsafe {
        api::pixmim_simt_launch(
            name.as_ptr(),
            (&raw const params).cast(),
            size_of::<Params>(),
            grid,
            block,
            shared_bytes,
            &options,
            text.as_mut_ptr(),
            2048,
        )
    };
    if failed == 0 { Ok(()) } else { Err(text_of(&text)) }
}

pub(crate) fn launch(
    kernel: &str,
    shape: [u32; 3],
    params: Params,
    seed: u32,
) -> Result<(), String> {
    launch_with(kernel, shape, params, api::Options { seed, threads: 0, checks: 1 })
}

/// The number of the line of faults.cu with this text.
fn line_of(text: &str) -> usize {
    let source = include_str!("faults.cu");
    source.lines().position(|line| line.contains(text)).unwrap() + 1
}

/// The kernel fails under each seed, with all of these words; and the executor goes on working.
fn finds(kernel: &str, shape: [u32; 3], n: i64, words: &[&str]) {
    for seed in [0, 1, 5, 77] {
        let x = Buffer::of("x", &vec![1.5; 512]);
        let y = Buffer::new("y", 128 * shape[0] as usize);
        let finding = launch(kernel, shape, Params::new(&x, &y, n), seed)
            .expect_err(&format!("{kernel} under seed {seed}"));
        assert!(finding.starts_with(&format!("{kernel}: block ")), "{finding}");
        assert!(finding.contains(", thread "), "{finding}");
        assert!(finding.contains("tests/executor/faults.cu"), "{finding}");
        assert!(finding.ends_with(&format!("[seed {seed}]")), "{finding}");
        for word in words {
            assert!(finding.contains(word), "`{word}` is not in: {finding}");
        }
        let y = Buffer::new("y", 128);
        launch("sound_copy", [1, 128, 0], Params::new(&x, &y, 128), seed).unwrap();
        assert_eq!(y.read().unwrap(), [1.5; 128]);
    }
}

/// One block of 128 threads with a float of shared memory each.
const BLOCK: [u32; 3] = [1, 128, 512];

#[test]
fn a_missing_barrier_is_found() {
    finds("fault_missing_barrier", BLOCK, 0, &["race: ", "no barrier between"]);
    let write = "race: st.shared writes";
    finds("fault_missing_barrier_before_overwrite", BLOCK, 0, &["race: ", "no barrier between"]);
    finds("fault_two_warps_write", BLOCK, 0, &[write, "written by thread", "no barrier between"]);
    finds("fault_ldmatrix_without_barrier", BLOCK, 0, &["race: ", "no barrier between"]);
    finds("fault_named_barrier_of_others", [1, 96, 512], 0, &["race: ", "no barrier between"]);
}

#[test]
fn a_race_within_a_warp_is_found() {
    finds("fault_missing_syncwarp", BLOCK, 0, &["race: ", "no __syncwarp between"]);
    let words = ["race: ", "no __syncwarp between"];
    finds("fault_missing_syncwarp_before_overwrite", BLOCK, 0, &words);
    finds("fault_two_lanes_write", BLOCK, 0, &["race: st.shared writes", "no __syncwarp between"]);
    finds("fault_syncwarp_of_the_wrong_half", BLOCK, 0, &words);
}

#[test]
fn a_missing_wait_is_found() {
    let shape = [1, 128, 2048];
    finds("fault_missing_wait", shape, 0, &["unwaited: ld.shared reads"]);
    finds("fault_wait_for_the_older_group", [1, 128, 4096], 0, &["unwaited: ld.shared reads"]);
    finds("fault_exit_without_wait", shape, 0, &["ends with 1 cp.async not waited for"]);
}

#[test]
fn an_access_out_of_bounds_is_found() {
    let dynamic = "of dynamic shared memory (512 bytes)";
    let read = ["out of bounds: ld.shared of 4 bytes at byte 512", dynamic];
    finds("fault_shared_read_past_the_end", BLOCK, 0, &read);
    let store = ["out of bounds: st.shared of 4 bytes at byte 512", dynamic, "thread 127 "];
    finds("fault_shared_store_past_the_end", BLOCK, 0, &store);
    let before = ["out of bounds: st.shared of 4 bytes at byte -4", dynamic, "thread 0 "];
    finds("fault_shared_store_before_the_start", BLOCK, 0, &before);
    let table = "at byte 256 of static 'table' (256 bytes)";
    finds("fault_static_read_past_the_end", BLOCK, 0, &["out of bounds: ld.shared", table]);
    finds("fault_static_store_past_the_end", BLOCK, 0, &["out of bounds: st.shared", table]);

    let load = "out of bounds: load of 4 bytes at byte";
    finds("fault_load_at", BLOCK, 512, &[load, "byte 2048 of global buffer 'x' (2048 bytes)"]);
    finds("fault_load_at", BLOCK, -1, &[load, "byte -4 of global buffer 'x' (2048 bytes)"]);
    finds("fault_load_at", BLOCK, 1 << 40, &[load.split_at(19).0, "in no buffer"]);
    let y = "of global buffer 'y' (512 bytes)";
    let line = format!("faults.cu:{}: ", line_of("threadIdx.x == 37"));
    let store = "out of bounds: store of 4 bytes at byte";
    finds("fault_store_at", BLOCK, 128, &[store, " 512 ", y, "thread 37 (warp 1, lane 5)", &line]);
    finds("fault_store_at", BLOCK, -3, &[store, " -12 ", y, &line]);
    let copy = ["out of bounds: cp.async of 16 bytes", "of global buffer 'x' (2048 bytes)"];
    finds("fault_cp_async_past_the_end", [1, 128, 2048], 512, &copy);
}

#[test]
fn between_two_buffers_and_before_a_buffer_at_the_front_of_its_page_is_out_of_bounds() {
    for seed in [0, 9] {
        let (first, second) =
            (Buffer::placed("first", 64, true), Buffer::placed("second", 64, true));
        first.write(&[0.0; 64]);
        let y = Buffer::new("y", 128);
        for n in [-1, 64, 4096] {
            let finding =
                launch("fault_load_at", BLOCK, Params::new(&first, &y, n), seed).unwrap_err();
            let words = format!("byte {} of global buffer 'first' (256 bytes)", 4 * n);
            assert!(finding.contains(&words), "{finding}");
        }
        // A store that reaches another buffer is not seen; what lies between is.
        let gap = (second.memory.addr() as i64 - first.memory.addr() as i64) / 4;
        let x = Buffer::of("x", &[0.0]);
        let before = Params { n: gap - 1, ..Params::new(&x, &first, 0) };
        let finding = launch("fault_store_at", BLOCK, before, seed).unwrap_err();
        assert!(finding.contains("byte -4 of global buffer 'second'"), "{finding}");
    }
}

#[test]
fn a_misaligned_access_is_found() {
    let shape = [1, 128, 8192];
    finds("fault_misaligned_ldmatrix", shape, 0, &["misaligned: ldmatrix of 16 bytes at byte 8 "]);
    finds("fault_misaligned_shared", shape, 0, &["misaligned: st.shared of 16 bytes"]);
    finds("fault_misaligned_global", shape, 0, &["misaligned: load of 16 bytes", "buffer 'x'"]);
}

#[test]
fn a_read_of_what_nothing_wrote_is_found() {
    let shared = ["uninitialised: ld.shared reads", "which nothing wrote"];
    finds("fault_uninitialised_shared", BLOCK, 0, &shared);
    let half = ["uninitialised: load of 4 bytes", "global buffer 'y'", "which nothing wrote"];
    finds("fault_half_a_word_written", BLOCK, 0, &half);
    for seed in [0, 6] {
        let (x, y) = (Buffer::new("x", 128), Buffer::new("y", 128));
        let params = Params::new(&x, &y, 0);
        let finding = launch("fault_uninitialised_global", BLOCK, params, seed).unwrap_err();
        let words = "of global buffer 'x' (512 bytes), which nothing wrote";
        assert!(finding.contains("uninitialised: load of 4 bytes at byte "), "{finding}");
        assert!(finding.contains(words), "{finding}");
    }
}

#[test]
fn a_race_between_blocks_is_found() {
    let line = format!("faults.cu:{} in the same launch", line_of("(float)blockIdx.x); }"));
    let words = ["race between blocks: store writes", "written by block", line.as_str()];
    finds("fault_blocks_write_one_word", [3, 128, 0], 0, &words);
    for threads in [1, 2] {
        for seed in [0, 1, 5, 77] {
            let (x, y) = (Buffer::of("x", &[0.0]), Buffer::of("y", &[0.0; 384]));
            let options = api::Options { seed, threads, checks: 1 };
            let params = Params::new(&x, &y, 0);
            let finding = launch_with("fault_blocks_read_and_write", [3, 128, 0], params, options);
            assert!(finding.unwrap_err().contains("race between blocks: "));
        }
    }
}

#[test]
fn an_unwritten_output_is_found() {
    for seed in [0, 4] {
        let (x, y) = (Buffer::of("x", &[0.0]), Buffer::new("y", 128));
        launch("fault_output_with_a_hole", BLOCK, Params::new(&x, &y, 0), seed).unwrap();
        let finding = y.read().unwrap_err();
        assert!(finding.contains("unwritten output: the host reads 4 bytes"), "{finding}");
        assert!(finding.contains("byte 28 of global buffer 'y' (512 bytes)"), "{finding}");
    }
}

#[test]
fn barriers_that_not_all_reach_alike_are_found() {
    finds(
        "fault_barrier_in_a_branch",
        BLOCK,
        0,
        &["divergent barrier: ", "wait in __syncthreads at"],
    );
    finds("fault_barrier_for_some", BLOCK, 0, &["__syncthreads"]);
    finds("fault_early_exit", BLOCK, 0, &["__syncthreads"]);
    let deadlock = ["deadlock: these wait for ever", "warp 0 lanes ffffffff in named barrier at"];
    finds("fault_deadlock", BLOCK, 0, &deadlock);
    let mixed = ["deadlock: ", "lanes 0000ffff in __syncthreads", "lanes ffff0000 in shuffle"];
    finds("fault_barrier_against_shuffle", BLOCK, 0, &mixed);
    finds("fault_mixed_named_barrier", BLOCK, 0, &["named barrier 2 of ", "threads here, of "]);
}

#[test]
fn collectives_that_not_all_lanes_join_are_found() {
    finds("fault_lane_leaves", BLOCK, 0, &["reduction"]);
    finds("fault_different_collectives", BLOCK, 0, &["divergent warp: ", "shuffle", "vote"]);
    finds("fault_overlapping_masks", BLOCK, 0, &["__syncwarp at"]);
    finds("fault_outside_its_mask", BLOCK, 0, &["leaves out the calling lane"]);
    finds("fault_shuffle_from_outside", BLOCK, 0, &["reads lane 20, which is not in the mask"]);
}

#[test]
fn what_the_hardware_catches_is_a_finding_too() {
    finds(
        "fault_raw_pointer",
        BLOCK,
        128,
        &["not through the wrappers", "byte 512 of global buffer 'y'"],
    );
    finds("fault_stack_overflow", BLOCK, 0, &["stack overflow"]);
    finds("fault_division_by_zero", BLOCK, 0, &["integer division by zero"]);
}

#[test]
fn a_launch_that_cannot_be_is_refused() {
    let (x, y) = (Buffer::of("x", &[0.0; 4]), Buffer::new("y", 4));
    let params = Params::new(&x, &y, 4);
    for (kernel, shape, words) in [
        ("absent", [1, 32, 0], "no kernel has this name"),
        ("sound_copy", [0, 32, 0], "a grid has 1 to"),
        ("sound_copy", [1, 0, 0], "a block has 1 to 128 threads, not 0"),
        ("sound_copy", [1, 129, 0], "a block has 1 to 128 threads, not 129"),
        ("sound_copy", [1, 32, 232_449], "at most 232448 bytes of shared memory"),
    ] {
        let refused = launch(kernel, shape, params, 0).unwrap_err();
        assert!(refused.contains(words), "{refused}");
    }
}

fn wave(len: usize) -> Vec<f32> {
    (0..len).map(|i| (i as f32 * 0.37).sin()).collect()
}

#[test]
fn a_kernel_without_faults_gives_the_same_bits_under_every_seed() {
    let x = Buffer::of("x", &wave(512));
    let run = |seed, threads, checks| {
        let y = Buffer::new("y", 5 * 128);
        let options = api::Options { seed, threads, checks };
        let shape = [5, 128, 4096];
        launch_with("sound_everything", shape, Params::new(&x, &y, 0), options).unwrap();
        y.read().unwrap().iter().map(|y| y.to_bits()).collect::<Vec<_>>()
    };
    let first = run(0, 1, 1);
    assert!(first.iter().all(|&bits| f32::from_bits(bits).is_finite()));
    for seed in [0, 1, 2, 3, 17, 99, 12345, 0x8000_0000] {
        for threads in [1, 2] {
            assert_eq!(run(seed, threads, 1), first, "seed {seed}, {threads} threads");
        }
        assert_eq!(run(seed, 1, 0), first, "seed {seed}, without checks");
    }
}

#[test]
fn two_blocks_may_share_a_word() {
    let x = Buffer::of("x", &[1.0; 128]);
    for seed in [0, 8] {
        let y = Buffer::new("y", 192);
        launch("sound_blocks_share_a_word", [3, 128, 0], Params::new(&x, &y, 0), seed).unwrap();
        let halves: Vec<_> = y.read().unwrap().iter().flat_map(|y| y.to_ne_bytes()).collect();
        for (i, half) in halves.chunks_exact(2).enumerate() {
            let value = bf16::from_ne_bytes([half[0], half[1]]).to_f32();
            assert_eq!(value, 1.0 + (i % 3) as f32);
        }
    }
}

#[test]
fn launches_from_several_threads_do_not_disturb_each_other() {
    std::thread::scope(|scope| {
        for id in 0..4u32 {
            scope.spawn(move || {
                let n = 1000 + 77 * id as usize;
                let values: Vec<f32> = (0..n).map(|i| ((i + id as usize) % 32) as f32).collect();
                let (x, y) = (Buffer::of("x", &values), Buffer::new("y", n));
                let params = Params::new(&x, &y, n as i64);
                for round in 0..40 {
                    let shape = [n.div_ceil(128) as u32, 128, 512];
                    launch("sound_copy", shape, params, round).unwrap();
                    assert_eq!(y.read().unwrap(), values);
                    if (round + id) % 3 == 0 {
                        let outside = Params { n: n as i64, ..params };
                        launch("fault_load_at", BLOCK, outside, round).unwrap_err();
                    }
                }
            });
        }
    });
}

#[test]
fn shuffles_votes_and_reductions_follow_the_programming_guide() {
    let (x, y) = (Buffer::of("x", &[0.0]), Buffer::new("y", 256));
    for seed in [0, 11] {
        launch("layout_shuffle", [1, 32, 0], Params::new(&x, &y, 0), seed).unwrap();
        let out = y.read().unwrap();
        for (lane, out) in out.chunks_exact(8).enumerate() {
            let segment = lane / 8 * 8;
            let same_parity = |of: &dyn Fn(usize) -> usize| -> usize {
                (0..32).filter(|l| l % 2 == lane % 2).map(of).sum()
            };
            let expected = [
                segment + 3,
                // xor 12 leaves the segment: to an earlier one it reads, to a later one it keeps its own.
                if lane ^ 12 < segment + 8 { lane ^ 12 } else { lane },
                if lane >= segment + 3 { lane - 3 } else { lane },
                if lane + 3 < segment + 8 { lane + 3 } else { lane },
                lane ^ 6,
                if lane + 2 < 32 { lane + 2 } else { lane },
                same_parity(&|l| usize::from(l < 11)),
                same_parity(&|l| l),
            ];
            assert_eq!(out, expected.map(|x| x as f32), "lane {lane}");
        }
    }
}

/// Rows of `layout_convert`: bits of the f16 pair, of the bf16 pair, x as f16, x as bf16, 2^x, log2 x.
fn convert(values: &[f32]) -> Vec<[f32; 6]> {
    let mut padded = values.to_vec();
    padded.resize(values.len().next_multiple_of(128), 1.0);
    let (x, y) = (Buffer::of("x", &padded), Buffer::new("y", 6 * padded.len()));
    let shape = [(padded.len() / 128) as u32, 128, 0];
    launch("layout_convert", shape, Params::new(&x, &y, 0), 0).unwrap();
    let rows = y.read().unwrap();
    rows.chunks_exact(6).take(values.len()).map(|row| row.try_into().unwrap()).collect()
}

#[test]
fn every_f16_and_bf16_survives_the_way_through_f32() {
    let all = 0..=u16::MAX;
    let finite: Vec<u16> = all.clone().filter(|&h| f16::from_bits(h).is_finite()).collect();
    let values: Vec<f32> = finite.iter().map(|&h| f16::from_bits(h).to_f32()).collect();
    for (row, (&bits, &x)) in convert(&values).iter().zip(finite.iter().zip(&values)) {
        assert_eq!(row[0].to_bits(), u32::from(bits) | u32::from(bits ^ 0x8000) << 16);
        assert_eq!(row[2].to_bits(), x.to_bits());
    }
    let finite: Vec<u16> = all.filter(|&h| bf16::from_bits(h).is_finite()).collect();
    let values: Vec<f32> = finite.iter().map(|&h| bf16::from_bits(h).to_f32()).collect();
    for (row, (&bits, &x)) in convert(&values).iter().zip(finite.iter().zip(&values)) {
        assert_eq!(row[1].to_bits(), u32::from(bits) | u32::from(bits ^ 0x8000) << 16);
        assert_eq!(row[3].to_bits(), x.to_bits());
    }
}

#[test]
fn conversions_round_to_nearest_even_and_nan_is_canonical() {
    let values: Vec<f32> =
        (0..200_000u32).map(|i| f32::from_bits(i.wrapping_mul(2_654_435_761))).collect();
    for (row, &x) in convert(&values).iter().zip(&values) {
        let (half, brain) = (row[0].to_bits() as u16, row[1].to_bits() as u16);
        if x.is_nan() {
            assert_eq!((half, brain), (0x7fff, 0x7fff));
        } else {
            assert_eq!(half, f16::from_f32(x).to_bits(), "{x:e}");
            assert_eq!(brain, bf16::from_f32(x).to_bits(), "{x:e}");
        }
    }
}

#[test]
fn ex2_and_lg2_are_right_to_a_few_units_in_the_last_place() {
    let values: Vec<f32> = (0..100_000).map(|i| (i as f32 - 50_000.0) * 0.00253).collect();
    for (row, &x) in convert(&values).iter().zip(&values) {
        let exact = f64::from(x).exp2();
        if exact >= f64::from(f32::MIN_POSITIVE) {
            assert!((f64::from(row[4]) / exact - 1.0).abs() <= 2.4e-7, "2^{x}: {}", row[4]);
        } else {
            assert_eq!(row[4], 0.0, "2^{x}");
        }
        if x > 0.0 {
            let log = f64::from(x).log2();
            assert!((f64::from(row[5]) - log).abs() <= 1.2e-7 * log.abs(), "log2 {x}: {}", row[5]);
        }
    }
    let ends = [f32::INFINITY, f32::NEG_INFINITY, 0.0, -1.0, 128.0, -126.0, -127.0, f32::NAN];
    let rows = convert(&ends);
    let powers: Vec<f32> = rows.iter().map(|row| row[4]).take(7).collect();
    assert_eq!(powers, [f32::INFINITY, 0.0, 1.0, 0.5, f32::INFINITY, f32::MIN_POSITIVE, 0.0]);
    assert_eq!((rows[0][5], rows[2][5]), (f32::INFINITY, f32::NEG_INFINITY));
    assert!(
        rows[1][5].is_nan() && rows[3][5].is_nan() && rows[7][4].is_nan() && rows[7][5].is_nan()
    );
}
