//! Crops on the device against the CPU in f64: every alignment of rows, every edge, both targets.

use half::bf16;
use pixmim::dtype::Element;
use pixmim::ops::input::{Forward, Geometry, Target, check_geometry, forward};
use pixmim::rng::{Purpose, Stream};
use pixmim::{DType, Device, Error, Result, TensorRef};

use crate::common::{
    Input, Output, Stored, gpu, masks, same_on_any_schedule, unit_roundoff, widen,
};

const MEAN: [f64; 3] = [0.485, 0.456, 0.406];
const STD: [f64; 3] = [0.229, 0.224, 0.225];

struct Batch {
    bytes: Vec<u8>,
    geometry: Vec<Geometry>,
    grid: usize,
    patch: usize,
    keep: Vec<i32>,
    masked: Vec<i32>,
}

fn noise(seed: u64, count: usize) -> Vec<u8> {
    let stream = Stream::new(1, 0, seed, Purpose::Init);
    (0..count as u32).map(|i| stream.word(i) as u8).collect()
}

impl Batch {
    /// Pictures of these heights and widths, cropped from top and left, and mirrored or not. The first starts with the
    /// tensor, the last ends with it; others lie apart by a few bytes.
    fn new(pictures: &[([i64; 4], bool)], grid: usize, patch: usize, kept: usize) -> Self {
        let (mut bytes, mut geometry) = (vec![], vec![]);
        for (i, &([height, width, top, left], flip)) in pictures.iter().enumerate() {
            let offset = bytes.len() as i64;
            bytes.extend(noise(i as u64, (3 * height * width) as usize));
            geometry.push(Geometry { offset, height, width, top, left, flip: i64::from(flip) });
            if i + 1 < pictures.len() {
                bytes.extend(vec![7; i % 3]);
            }
        }
        let masks = masks(3, pictures.len(), grid * grid, kept);
        let batch = Self { bytes, geometry, grid, patch, keep: masks.keep, masked: masks.masked };
        check_geometry(&batch.geometry, batch.bytes.len(), batch.side()).unwrap();
        batch
    }

    fn side(&self) -> usize {
        self.grid * self.patch
    }

    /// The patches, and the target (`W`) or the pixels (`P`).
    fn run<T: Element, W: Element, P: Element>(
        &self,
        dev: &Device,
    ) -> (Vec<T>, Vec<W>, Vec<T>, Vec<P>) {
        let images = self.geometry.len();
        let (kept, masked) = (self.keep.len() / images, self.masked.len() / images);
        let (numbers, side) = (3 * self.patch * self.patch, self.side());
        let bytes = Input::new(dev, &self.bytes, &[self.bytes.len()]);
        let words: &[i64] = bytemuck::cast_slice(&self.geometry);
        let geometry = Input::new(dev, words, &[images, 6]);
        let keep = Input::new(dev, &self.keep, &[images, kept]);
        let ids_masked = Input::new(dev, &self.masked, &[images, masked]);
        let forward = |target: Target<'_>| {
            let mut patches = Output::new(dev, T::DTYPE, &[images, kept, numbers]);
            let args = Forward {
                patches: patches.view(),
                target,
                images: bytes.view(),
                geometry: geometry.view(),
                ids_keep: keep.view(),
                mean: MEAN,
                std: STD,
                patch_size: self.patch,
            };
            forward(dev, args).unwrap();
            patches.values()
        };
        let mut target = Output::new(dev, W::DTYPE, &[images, masked, numbers]);
        let raw = Target::Raw { target: target.view(), ids_masked: ids_masked.view() };
        let of_raw = forward(raw);
        let mut pixels = Output::new(dev, P::DTYPE, &[images, 3, side, side]);
        let of_filtered = forward(Target::Filtered { pixels: pixels.view() });
        (of_raw, target.values(), of_filtered, pixels.values())
    }

    fn check<T: Stored>(&self) {
        let (patches, target, again, pixels) = self.run::<T, f32, u8>(&gpu());
        let (want, want_target, _, want_pixels) = self.run::<f64, f64, f64>(&Device::cpu());
        // f32 to one place in the last bit, then one rounding to the stored precision.
        let ulp = 2.0 * unit_roundoff::<f32>();
        near("target", &widen(&target), &want_target, ulp);
        let tol = if T::DTYPE == DType::F32 { ulp } else { unit_roundoff::<T>() + ulp };
        near("patches", &widen(&patches), &want, tol);
        assert_eq!(widen(&patches), widen(&again), "patches do not depend on the target");
        let want: Vec<u8> = want_pixels.iter().map(|x| (255.0 * x).round() as u8).collect();
        assert!(pixels == want, "pixels of {} x {}", self.grid, self.patch);
    }
}

/// Every number is off by at most `tol` of itself, near 0 by the little that three f32 cannot say.
#[track_caller]
fn near(name: &str, got: &[f64], want: &[f64], tol: f64) {
    assert_eq!(got.len(), want.len(), "{name}");
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        assert!((got - want).abs() <= tol * want.abs() + 1e-13, "{name} {i}: {got} not {want}");
    }
}

#[test]
fn crops_inside_and_over_each_edge_are_those_of_the_cpu() {
    let pictures = [
        ([15, 20, 2, 3], false),
        ([12, 13, 0, 1], true),
        ([12, 40, -4, -4], false),
        ([30, 12, 22, 4], true),
        // As far over as one reflection reaches.
        ([12, 14, -11, 15], true),
        ([14, 12, 15, -11], false),
        // Wholly beyond an edge.
        ([40, 50, -20, 60], false),
        ([50, 40, 60, -20], true),
        // Smaller than the crop.
        ([8, 9, -2, -3], true),
    ];
    for (grid, patch, kept) in [(4, 3, 5), (3, 4, 2), (6, 2, 9), (1, 12, 1), (2, 6, 4), (12, 1, 30)]
    {
        Batch::new(&pictures, grid, patch, kept).check::<f32>();
        Batch::new(&pictures, grid, patch, kept).check::<bf16>();
    }
}

#[test]
fn rows_of_any_alignment_are_read_exactly() {
    // Widths and first columns in all remainders of 16.
    let picture = |i: i64| ([17 + i % 3, 33 + i, i % 2, (7 * i) % 17], i % 2 == 0);
    let pictures: Vec<_> = (0..16).map(picture).collect();
    Batch::new(&pictures, 4, 4, 3).check::<bf16>();
    // Images of one pixel more than nothing.
    let pictures = [([1, 1, 0, 0], false), ([1, 2, 0, 0], true), ([2, 1, 0, 0], false)];
    Batch::new(&pictures, 1, 1, 1).check::<f32>();
}

#[test]
fn crops_of_the_usual_sizes_are_those_of_the_cpu() {
    let pictures = [([224, 256, -4, 17], true), ([231, 224, 5, 3], false)];
    Batch::new(&pictures, 14, 16, 49).check::<bf16>();
    Batch::new(&pictures[..1], 16, 14, 64).check::<bf16>();
    Batch::new(&[([224, 299, 0, 75], false)], 7, 32, 12).check::<f32>();
}

#[test]
fn all_bytes_are_normalised_to_one_place_in_f32() {
    let mut batch = Batch::new(&[([16, 16, 0, 0], false)], 2, 8, 1);
    batch.bytes = (0..=255u8).flat_map(|byte| [byte; 3]).collect();
    batch.check::<f32>();
}

#[test]
fn schedules_change_no_bit() {
    let pictures = [([40, 50, 3, 5], true), ([35, 33, -2, 2], false), ([33, 32, 0, 0], true)];
    let batch = Batch::new(&pictures, 4, 8, 4);
    same_on_any_schedule(|dev| {
        let (patches, target, _, pixels) = batch.run::<bf16, f32, u8>(dev);
        let bytes = [bytemuck::cast_slice::<_, u8>(&patches), bytemuck::cast_slice(&target)];
        [bytes.concat(), pixels].concat()
    });
}

#[test]
fn geometry_is_judged_on_the_host() {
    let good = Geometry { height: 5, width: 6, top: 1, left: 2, ..Geometry::default() };
    check_geometry(&[good; 3], 90, 4).unwrap();
    for bad in [
        Geometry { offset: 1, ..good },
        Geometry { offset: -1, ..good },
        Geometry { top: -5, ..good },
        Geometry { left: 8, ..good },
        Geometry { flip: 2, ..good },
        Geometry { height: i64::MAX, ..good },
    ] {
        let err = check_geometry(&[good, bad], 90, 4).unwrap_err();
        let want =
            format!("`input::forward: geometry` of image 1 does not fit: {bad:?} in 90 bytes");
        assert_eq!(err.to_string(), want);
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let dev = gpu();
    let bytes = [9u8; 90];
    let images = Input::new(&dev, &bytes, &[90]);
    let geometry = Input::new(&dev, &[0i64, 5, 6, 1, 2, 0, 0, 0], &[8]);
    let keep = Input::new(&dev, &[3i32], &[1, 1]);
    let on_host = TensorRef::new(&bytes, &[90]).unwrap();
    let call =
        |images: TensorRef<'_>, geometry: TensorRef<'_>, dtype, pixels, side, patch: usize| {
            let mut patches = Output::new(&dev, dtype, &[1, 1, 3 * patch * patch]);
            let mut pixels = Output::new(&dev, pixels, &[1, 3, side, side]);
            let args = Forward {
                patches: patches.view(),
                target: Target::Filtered { pixels: pixels.view() },
                images,
                geometry,
                ids_keep: keep.view(),
                mean: MEAN,
                std: STD,
                patch_size: patch,
            };
            let result: Result<()> = forward(&dev, args);
            result.unwrap_err()
        };
    let good = || geometry.view().split_at(6).0.reshaped(&[1, 6]).unwrap();
    let err = call(images.view(), good(), DType::F64, DType::U8, 4, 2);
    assert!(matches!(err, Error::DType { arg: "patches", .. }), "{err}");
    let err = call(images.view(), good(), DType::Bf16, DType::F32, 4, 2);
    assert!(matches!(err, Error::DType { arg: "target.pixels", .. }), "{err}");
    let err = call(images.view(), good(), DType::Bf16, DType::U8, 5, 2);
    assert!(matches!(err, Error::Shape { arg: "target.pixels", .. }), "{err}");
    let err = call(on_host, good(), DType::Bf16, DType::U8, 4, 2);
    assert!(matches!(err, Error::Place { arg: "images", .. }), "{err}");
    let odd = geometry.view().split_at(1).1.split_at(6).0.reshaped(&[1, 6]).unwrap();
    let err = call(images.view(), odd, DType::Bf16, DType::U8, 4, 2);
    assert!(err.to_string().contains("starts at a multiple of 16"), "{err}");
    let err = call(images.view(), good(), DType::Bf16, DType::U8, 300, 300);
    let want = "`input::forward: patch_size` is 300: a row of 1 patches needs 280804 bytes of shared memory";
    assert!(err.to_string().starts_with(want), "{err}");
}
