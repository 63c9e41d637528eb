//! Rectangles resampled on the device: the bytes of the CPU, whatever their sizes.

use pixmim::ops::input::Geometry;
use pixmim::ops::resize::Interpolation::{self, Bicubic, Bilinear};
use pixmim::ops::resize::{Forward, check_geometry, forward};
use pixmim::rng::{Purpose, Stream};
use pixmim::{DType, Device, Error, TensorRef};

use crate::common::{Input, Output, gpu, same_on_any_schedule};

struct Batch {
    bytes: Vec<u8>,
    geometry: Vec<Geometry>,
}

impl Batch {
    /// Noise of these heights and widths, every other one mirrored. The first starts with the tensor, the last ends with
    /// it; others lie apart by a few bytes.
    fn new(sizes: &[[usize; 2]]) -> Self {
        let (mut bytes, mut geometry) = (vec![], vec![]);
        for (i, &[height, width]) in sizes.iter().enumerate() {
            let (offset, flip) = (bytes.len() as i64, (i % 2) as i64);
            let (height, width) = (height as i64, width as i64);
            geometry.push(Geometry { offset, height, width, flip, ..Geometry::default() });
            let noise = Stream::new(1, 0, i as u64, Purpose::Init);
            // Black, white and all between: sums that are clipped, and ones that are not.
            let byte = |j| (128.0 + 160.0 * (2.0 * noise.uniform(j) - 1.0)) as u8;
            bytes.extend((0..(3 * height * width) as u32).map(byte));
            if i + 1 < sizes.len() {
                bytes.extend(vec![7; i % 3]);
            }
        }
        check_geometry(&geometry, bytes.len()).unwrap();
        Self { bytes, geometry }
    }

    fn run(&self, dev: &Device, side: usize, interpolation: Interpolation) -> Vec<u8> {
        let images = self.geometry.len();
        let bytes = Input::new(dev, &self.bytes, &[self.bytes.len()]);
        let words: &[i64] = bytemuck::cast_slice(&self.geometry);
        let geometry = Input::new(dev, words, &[images, 6]);
        let mut crops = Output::new(dev, DType::U8, &[images, side, side, 3]);
        let args = Forward {
            crops: crops.view(),
            images: bytes.view(),
            geometry: geometry.view(),
            interpolation,
        };
        forward(dev, args).unwrap();
        crops.values()
    }

    #[track_caller]
    fn check(&self, side: usize, interpolation: Interpolation) {
        let got = self.run(&gpu(), side, interpolation);
        let want = self.run(&Device::cpu(), side, interpolation);
        let of_image = 3 * side * side;
        for (i, (got, want)) in got.chunks(of_image).zip(want.chunks(of_image)).enumerate() {
            let wrong = got.iter().zip(want).position(|(got, want)| got != want);
            let Some(at) = wrong else { continue };
            let (row, column) = (at / 3 / side, at / 3 % side);
            let found = (got[at], want[at]);
            panic!(
                "{interpolation:?} to {side}, {:?}: {found:?} at {row}, {column}",
                self.geometry[i]
            );
        }
        assert_eq!(got.len(), want.len());
    }
}

#[test]
fn rectangles_of_any_size_give_the_bytes_of_the_cpu() {
    // One pixel, lines, the crop's own size in one axis and in both, larger, smaller, long and narrow.
    let sizes = [
        [1, 1],
        [1, 7],
        [9, 1],
        [2, 2],
        [33, 33],
        [33, 50],
        [61, 33],
        [13, 21],
        [40, 40],
        [101, 37],
        [70, 95],
        [3, 290],
        [310, 4],
    ];
    let batch = Batch::new(&sizes);
    // Within a tile, whole tiles, cut ones; rows that start at words and ones that do not.
    for side in [1, 5, 32, 33, 40, 67] {
        batch.check(side, Bicubic);
        batch.check(side, Bilinear);
    }
}

#[test]
fn rows_of_any_alignment_give_the_bytes_of_the_cpu() {
    let sizes: Vec<_> = (0..17).map(|i| [18 + i % 3, 31 + i]).collect();
    Batch::new(&sizes).check(20, Bicubic);
}

#[test]
fn windows_wider_than_shared_memory_give_the_bytes_of_the_cpu() {
    Batch::new(&[[211, 640], [640, 211]]).check(3, Bicubic);
    Batch::new(&[[150, 1300], [1300, 150]]).check(40, Bilinear);
}

#[test]
fn the_longest_crops_of_photos_give_the_bytes_of_the_cpu() {
    Batch::new(&[[45, 4500]]).check(224, Bicubic);
    Batch::new(&[[4500, 45]]).check(224, Bilinear);
    Batch::new(&[[375, 500], [224, 224]]).check(224, Bicubic);
}

#[test]
fn schedules_change_no_byte() {
    let batch = Batch::new(&[[50, 61], [20, 300], [35, 35]]);
    same_on_any_schedule(|dev| batch.run(dev, 38, Bicubic));
}

#[test]
fn geometry_is_judged_on_the_host() {
    let good = Geometry { height: 5, width: 6, ..Geometry::default() };
    check_geometry(&[good; 3], 90).unwrap();
    for bad in [
        Geometry { offset: 1, ..good },
        Geometry { offset: -1, ..good },
        Geometry { top: 1, ..good },
        Geometry { left: -1, ..good },
        Geometry { flip: 2, ..good },
        Geometry { height: 0, ..good },
        Geometry { height: i64::MAX, ..good },
    ] {
        let err = check_geometry(&[good, bad], 90).unwrap_err();
        let want =
            format!("`resize::forward: geometry` of image 1 does not fit: {bad:?} in 90 bytes");
        assert_eq!(err.to_string(), want);
    }
    let long = Geometry { height: 1, width: (1 << 20) + 1, ..good };
    check_geometry(&[long], 4 << 20).unwrap_err();
    check_geometry(&[Geometry { width: 1 << 20, ..long }], 4 << 20).unwrap();
}

#[test]
fn what_does_not_fit_is_refused() {
    let dev = gpu();
    let bytes = [9u8; 90];
    let images = Input::new(&dev, &bytes, &[90]);
    let geometry = Input::new(&dev, &[0i64, 5, 6, 0, 0, 0], &[1, 6]);
    let call = |images: TensorRef<'_>, dtype, shape: &[usize]| {
        let mut crops = Output::new(&dev, dtype, shape);
        let (crops, geometry) = (crops.view(), geometry.view());
        forward(&dev, Forward { crops, images, geometry, interpolation: Bicubic }).unwrap_err()
    };
    let err = call(TensorRef::new(&bytes, &[90]).unwrap(), DType::U8, &[1, 4, 4, 3]);
    assert!(matches!(err, Error::Place { arg: "images", .. }), "{err}");
    let err = call(images.view(), DType::F32, &[1, 4, 4, 3]);
    assert!(matches!(err, Error::DType { arg: "crops", .. }), "{err}");
    for shape in [[1, 4, 5, 3], [1, 4, 4, 4], [1, 0, 0, 3]] {
        let err = call(images.view(), DType::U8, &shape);
        assert!(matches!(err, Error::Shape { arg: "crops", .. }), "{err}");
    }
    let err = call(images.view(), DType::U8, &[2, 4, 4, 3]);
    assert!(matches!(err, Error::Shape { arg: "geometry", .. }), "{err}");
}
