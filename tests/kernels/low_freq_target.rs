//! The low-pass target: against the f64 op on photos, as the loss sees it, and on images that are hard for a filter.

use pixmim::ops::low_freq_target::{Filter, Forward, forward, workspace_bytes};
use pixmim::{DType, Device, Error};

use crate::common::{Input, Output, gpu, masks, same_on_any_schedule, uniform, workspace};

const MEAN: [f64; 3] = [0.485, 0.456, 0.406];
const STD: [f64; 3] = [0.229, 0.224, 0.225];

/// What is asked of the op.
#[derive(Clone, Copy)]
struct Case {
    size: usize,
    radius: f64,
    patch: usize,
    exact: bool,
}

const OF_224: Case = Case { size: 224, radius: 40.0, patch: 16, exact: false };
const OF_448: Case = Case { size: 448, radius: 80.0, patch: 16, exact: false };

/// Largest errors (rms, maximum) of colours on [0, 1]: twice those measured. Operands have 11 bits, so a number of 1/2 is
/// off by 1e-4; sums of many are off by less, where sharp edges excite all frequencies at once by more.
const NOISE: [f64; 2] = [1e-4, 5e-4];
const HARD: [f64; 2] = [3e-4, 1.4e-3];
/// In f32, whose numbers of 1/2 are off by 3e-8.
const EXACT: [f64; 2] = [2e-7, 1.4e-6];

impl Case {
    fn grid(self) -> usize {
        self.size / self.patch
    }

    fn images<T>(self, pixels: &[T]) -> usize {
        pixels.len() / (3 * self.size * self.size)
    }

    /// All patches but a quarter, in random order, other ones in each image.
    fn masked<T>(self, pixels: &[T]) -> Vec<i32> {
        let patches = self.grid() * self.grid();
        masks(self.size as u64, self.images(pixels), patches, patches / 4).masked
    }

    /// The target of the masked patches, by the device or by the f64 op.
    fn run<T: pixmim::dtype::Element>(self, dev: &Device, pixels: &[T], ids: &[i32]) -> Output {
        let Case { size, radius, patch, exact } = self;
        let images = self.images(pixels);
        let masked = ids.len() / images;
        let filter = Filter::new(dev, size, radius).unwrap();
        let dtype = if T::DTYPE == DType::F64 { DType::F64 } else { DType::F32 };
        let mut target = Output::new(dev, dtype, &[images, masked, 3 * patch * patch]);
        let bytes = workspace_bytes(dev, T::DTYPE, images, &filter, exact);
        let done = forward(
            dev,
            Forward {
                target: target.view(),
                pixels: Input::new(dev, pixels, &[images, 3, size, size]).view(),
                ids_masked: Input::new(dev, ids, &[images, masked]).view(),
                filter: &filter,
                mean: MEAN,
                std: STD,
                patch_size: patch,
                exact,
                workspace: workspace(dev, bytes).view(),
            },
        );
        done.unwrap();
        target
    }

    fn on(self, dev: &Device, pixels: &[u8], ids: &[i32]) -> Vec<f64> {
        self.run(dev, pixels, ids).values::<f32>().into_iter().map(f64::from).collect()
    }

    fn oracle(self, pixels: &[f64], ids: &[i32]) -> Vec<f64> {
        self.run(&Device::cpu(), pixels, ids).values()
    }
}

fn unit(bytes: &[u8]) -> Vec<f64> {
    bytes.iter().map(|&b| f64::from(b) / 255.0).collect()
}

fn bytes(seed: u64, count: usize) -> Vec<u8> {
    uniform::<f32>(seed, count).into_iter().map(|x| ((x + 1.0) * 128.0) as u8).collect()
}

fn rms(values: impl ExactSizeIterator<Item = f64>) -> f64 {
    let count = values.len() as f64;
    (values.map(|x| x * x).sum::<f64>() / count).sqrt()
}

/// Differences in colours on [0, 1].
fn colour_errors<'a>(got: &'a [f64], want: &'a [f64]) -> impl ExactSizeIterator<Item = f64> + 'a {
    assert_eq!(got.len(), want.len());
    got.iter().zip(want).enumerate().map(|(i, (g, w))| (g - w) * STD[i % 3])
}

#[track_caller]
fn assert_colours(name: &str, got: &[f64], want: &[f64], [rms_tol, max_tol]: [f64; 2]) {
    let (mean, max) = (
        rms(colour_errors(got, want)),
        colour_errors(got, want).fold(0.0, |m, e| if e.abs() <= m { m } else { e.abs() }),
    );
    assert!(mean <= rms_tol && max <= max_tol, "{name}: rms {mean:e}, largest {max:e}");
}

/// Patches normalised by their own mean and variance, as the loss does.
#[cfg(feature = "train")]
fn normalised(target: &[f64], numbers: usize) -> Vec<f64> {
    let mut out = Vec::with_capacity(target.len());
    for patch in target.chunks_exact(numbers) {
        let mean = patch.iter().sum::<f64>() / numbers as f64;
        let squares = patch.iter().map(|t| (t - mean) * (t - mean)).sum::<f64>();
        let deviation = (squares / (numbers - 1) as f64 + 1e-6).sqrt();
        out.extend(patch.iter().map(|t| (t - mean) / deviation));
    }
    out
}

/// Errors (rms) of the normalised target of each image, ascending.
#[cfg(feature = "train")]
fn normalised_errors(case: Case, pixels: &[u8]) -> Vec<f64> {
    let ids = case.masked(pixels);
    let numbers = 3 * case.patch * case.patch;
    let got = normalised(&case.on(&gpu(), pixels, &ids), numbers);
    let want = normalised(&case.oracle(&unit(pixels), &ids), numbers);
    let each = want.len() / case.images(pixels);
    let error = |(got, want): (&[f64], &[f64])| rms(got.iter().zip(want).map(|(g, w)| g - w));
    let mut errors: Vec<f64> =
        got.chunks_exact(each).zip(want.chunks_exact(each)).map(error).collect();
    errors.sort_by(f64::total_cmp);
    errors
}

/// The bundled photos with these numbers in alphabetical order, short side resized, centre cropped: planes.
#[cfg(feature = "train")]
fn photos(size: usize, numbers: &[usize]) -> Vec<u8> {
    use pixmim::data::{augment, decode};
    use pixmim::train::config::Interpolation;
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/photos");
    let folders = ["animal", "nature", "object", "urban"].map(|name| root.join(name));
    let files = folders.iter().flat_map(|folder| std::fs::read_dir(folder).unwrap());
    let mut files: Vec<_> = files.map(|file| file.unwrap().path()).collect();
    files.sort();
    let mut planes = vec![];
    for &number in numbers {
        let file = std::fs::read(&files[number]).unwrap();
        let photo = decode::decode(&file, &decode::Options::default()).unwrap();
        let (photo, crop) = augment::center(&photo, size, Interpolation::Bicubic);
        for at in 0..3 * size * size {
            let (c, y, x) = (at / size / size, at / size % size, at % size);
            let (y, x) = (y + crop.top as usize, x + crop.left as usize);
            planes.push(photo.pixels[(y * photo.width + x) * 3 + c]);
        }
    }
    planes
}

#[cfg(feature = "train")]
#[test]
fn photos_of_224_are_filtered_to_a_thousandth() {
    let errors = normalised_errors(OF_224, &photos(224, &[0, 9, 20, 33, 45, 54, 61]));
    assert!(errors[3] <= 2e-3 && errors[6] <= 6e-3, "{errors:?}");
}

#[cfg(feature = "train")]
#[test]
fn photos_of_448_are_filtered_to_a_thousandth() {
    let errors = normalised_errors(OF_448, &photos(448, &[9, 42, 45]));
    assert!(errors[1] <= 2e-3 && errors[2] <= 6e-3, "{errors:?}");
}

#[cfg(feature = "train")]
#[test]
fn photos_are_filtered_exactly_where_that_is_asked() {
    let pixels = photos(224, &[0, 9, 20, 49]);
    let errors = normalised_errors(Case { exact: true, ..OF_224 }, &pixels);
    assert!(errors[3] <= 1e-5, "{errors:?}");
}

/// Three planes, other ones for each channel.
fn planes(size: usize, value: impl Fn(usize, usize, usize) -> u8) -> Vec<u8> {
    (0..3 * size * size).map(|i| value(i / size / size, i / size % size, i % size)).collect()
}

#[test]
fn hard_edges_and_flat_images_keep_their_colours() {
    for case in [OF_224, OF_448] {
        let s = case.size;
        let checkerboard = planes(s, |c, y, x| if (y >> c ^ x >> c) & 1 == 1 { 255 } else { 0 });
        let constant = planes(s, |c, _, _| [0, 37, 255][c]);
        let bright_pixel = planes(s, |c, y, x| if (y, x) == (s / 3, c) { 255 } else { 0 });
        let black_border = planes(s, |c, y, x| {
            let inside = |i: usize| (20..s - 31 - c).contains(&i);
            if inside(y) && inside(x) { 200 + (y + x) as u8 % 56 } else { 0 }
        });
        for (name, pixels) in [
            ("checkerboard", checkerboard),
            ("constant", constant),
            ("bright pixel", bright_pixel),
            ("black border", black_border),
        ] {
            let ids = case.masked(&pixels);
            let (got, want) = (case.on(&gpu(), &pixels, &ids), case.oracle(&unit(&pixels), &ids));
            assert_colours(name, &got, &want, HARD);
        }
    }
}

#[test]
fn any_patch_is_gathered_from_where_it_is() {
    for (case, patches) in [(OF_224, [14, 7, 28, 56]), (OF_448, [14, 7, 64, 112])] {
        let pixels = bytes(3, 3 * case.size * case.size);
        for patch in patches {
            let case = Case { patch, ..case };
            let ids = case.masked(&pixels);
            let (got, want) = (case.on(&gpu(), &pixels, &ids), case.oracle(&unit(&pixels), &ids));
            assert_colours(&format!("{} in patches of {patch}", case.size), &got, &want, NOISE);
        }
    }
}

#[test]
fn each_image_has_its_own_mask() {
    // One more than the split kernels take at once; the f64 op sees the first and the last two.
    for (case, images) in [(OF_224, 3), (OF_448, 65)] {
        let each = 3 * case.size * case.size;
        let pixels = bytes(5, images * each);
        let grid = case.grid();
        let row = |image: usize| {
            let row = (grid - 1 - image % grid) * grid;
            (0..grid).map(move |i| (row + (i + image) % grid) as i32)
        };
        let ids: Vec<i32> = (0..images).flat_map(row).collect();
        let got = case.on(&gpu(), &pixels, &ids);
        let numbers = got.len() / images;
        for image in [0, images - 2, images - 1] {
            let pixels = unit(&pixels[image * each..][..each]);
            let want = case.oracle(&pixels, &ids[image * grid..][..grid]);
            assert_colours("image", &got[image * numbers..][..numbers], &want, NOISE);
        }
    }
}

#[test]
fn any_size_and_radius_are_filtered_in_f32() {
    for (size, radius, patch, images) in [
        (8, 2.0, 2, 2),
        (15, 5.0, 5, 3),
        (14, 0.75, 7, 1),
        (33, 8.0, 11, 2),
        (33, 40.0, 3, 1),
        (64, 20.5, 8, 1),
        (96, 47.0, 32, 21), // in two goes
        (224, 20.0, 16, 1),
    ] {
        let case = Case { size, radius, patch, exact: false };
        let pixels = bytes(size as u64, images * 3 * size * size);
        let ids = case.masked(&pixels);
        let want = case.oracle(&unit(&pixels), &ids);
        let name = format!("{size}, radius {radius}");
        assert_colours(&name, &case.on(&gpu(), &pixels, &ids), &want, EXACT);
        let floats: Vec<f32> = unit(&pixels).into_iter().map(|x| x as f32).collect();
        let wide: Vec<f64> = floats.iter().copied().map(f64::from).collect();
        let got = case.run(&gpu(), &floats, &ids).values::<f32>();
        let got: Vec<f64> = got.into_iter().map(f64::from).collect();
        assert_colours(&name, &got, &case.oracle(&wide, &ids), EXACT);
    }
}

#[test]
fn the_schedule_changes_no_bit() {
    let odd = Case { size: 33, radius: 8.0, patch: 11, exact: false };
    for case in [OF_224, OF_448, odd] {
        let pixels = bytes(7, 3 * case.size * case.size);
        let ids = case.masked(&pixels);
        same_on_any_schedule(|dev| case.run(dev, &pixels, &ids).values::<f32>());
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let (dev, cpu) = (gpu(), Device::cpu());
    let filter = Filter::new(&dev, 8, 2.0).unwrap();
    let [bytes, halves] = [DType::U8, DType::Bf16].map(|dtype| (dtype, &[1usize, 3, 8, 8][..]));
    let call = |filter: &Filter,
                pixels: (DType, &[usize]),
                target: DType,
                masked_on: &Device,
                work: usize| {
        let mut target = Output::new(&dev, target, &[1, 2, 12]);
        let mut pixels = Output::new(&dev, pixels.0, pixels.1);
        let done = forward(
            &dev,
            Forward {
                target: target.view(),
                pixels: pixels.as_ref(),
                ids_masked: Input::new(masked_on, &[1, 3], &[1, 2]).view(),
                filter,
                mean: MEAN,
                std: STD,
                patch_size: 2,
                exact: false,
                workspace: workspace(&dev, work).view(),
            },
        );
        done.unwrap_err()
    };
    let enough = workspace_bytes(&dev, DType::U8, 1, &filter, false);
    let err = call(&filter, halves, DType::F32, &dev, enough);
    assert!(matches!(err, Error::DType { arg: "pixels", .. }), "{err}");
    let err = call(&filter, bytes, DType::U8, &dev, enough);
    assert!(matches!(err, Error::DType { arg: "target", .. }), "{err}");
    let err = call(&filter, bytes, DType::F32, &cpu, enough);
    assert!(matches!(err, Error::Place { arg: "ids_masked", .. }), "{err}");
    let err = call(&filter, bytes, DType::F32, &dev, enough - 1);
    assert!(matches!(err, Error::Workspace { .. }), "{err}");
    let err = call(&Filter::new(&cpu, 8, 2.0).unwrap(), bytes, DType::F32, &dev, enough);
    assert!(matches!(err, Error::Place { arg: "filter", .. }), "{err}");
    let err = call(&Filter::new(&dev, 10, 2.0).unwrap(), bytes, DType::F32, &dev, enough);
    assert!(matches!(err, Error::Invalid { .. }), "{err}");

    let filter = Filter::new(&dev, 224, 40.0).unwrap();
    let mut target = Output::new(&dev, DType::F32, &[1, 1, 12]);
    let done = forward(
        &dev,
        Forward {
            target: target.view(),
            pixels: Output::new(&dev, DType::U8, &[1, 3, 224, 224]).as_ref(),
            ids_masked: Input::new(&dev, &[1], &[1, 1]).view(),
            filter: &filter,
            mean: MEAN,
            std: STD,
            patch_size: 2,
            exact: false,
            workspace: workspace(&dev, 0).view(),
        },
    );
    let err = done.unwrap_err().to_string();
    let want = "`low_freq_target: patch_size` is 2: 112 x 112 patches, of which the half-precision kernel takes 4096; \
                set `exact`";
    assert_eq!(err, want);
}
