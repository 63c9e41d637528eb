//! Grids and timelines, decoded again and compared pixel by pixel.

use std::fs;
use std::path::Path;

use pixmim::train::pictures::{Picture, Reconstruction, Settings, draw};
use pixmim::train::timeline;

/// 15 x 15 pixels in 3 x 3 patches: no size equals another but the sides.
const SIDE: usize = 15;
const PATCH: usize = 5;
const MEAN: [f32; 3] = [0.45, 0.5, 0.4];
const STD: [f32; 3] = [0.2, 0.25, 0.3];
const MASKED: [bool; 9] = [true, false, true, true, true, false, true, false, true];
const COLUMNS: usize = 6;

pub(crate) fn settings(norm_pix: bool) -> Settings<'static> {
    Settings {
        image_size: SIDE,
        patch_size: PATCH,
        mean: MEAN,
        std: STD,
        norm_pix,
        target: "low-pass r=2.7",
    }
}

fn noise(seed: u32) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        0.1 + 0.8 * (state >> 8) as f32 / (1 << 24) as f32
    };
    (0..SIDE * SIDE * 3).map(|_| next()).collect()
}

/// Index into an image of number `i` of patch `patch`, by rows, columns, channels.
fn at(patch: usize, i: usize) -> usize {
    let (row, column, channel) = (i / 15, i / 3 % 5, i % 3);
    ((patch / 3 * 5 + row) * SIDE + patch % 3 * 5 + column) * 3 + channel
}

/// What a perfect network puts out for `target`, in f64.
fn perfect(target: &[f32], norm_pix: bool) -> Vec<f32> {
    let mut output = Vec::new();
    for patch in 0..9 {
        let values: Vec<f64> = (0..75)
            .map(|i| f64::from(target[at(patch, i)] - MEAN[i % 3]) / f64::from(STD[i % 3]))
            .collect();
        let mean = values.iter().sum::<f64>() / 75.0;
        let variance = values.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / 74.0;
        let scale = (variance + 1e-6).sqrt();
        let normalised = |v: f64| if norm_pix { (v - mean) / scale } else { v };
        output.extend(values.into_iter().map(|v| normalised(v) as f32));
    }
    output
}

pub(crate) fn example(norm_pix: bool) -> Reconstruction {
    let target = noise(2);
    let prediction = perfect(&target, norm_pix);
    Reconstruction { pixels: noise(1), target, masked: MASKED.to_vec(), prediction }
}

pub(crate) struct Decoded {
    pub(crate) width: usize,
    pub(crate) height: usize,
    bytes: Vec<u8>,
    facts: serde_json::Value,
}

pub(crate) fn decode(png: &[u8]) -> Decoded {
    let mut reader = png::Decoder::new(std::io::Cursor::new(png)).read_info().unwrap();
    let text = reader.info().uncompressed_latin1_text.iter().find(|c| c.keyword == "pixmim");
    let facts = text.map_or(serde_json::Value::Null, |c| serde_json::from_str(&c.text).unwrap());
    let mut bytes = vec![0; reader.output_buffer_size().unwrap()];
    let info = reader.next_frame(&mut bytes).unwrap();
    assert_eq!(info.color_type, png::ColorType::Rgb);
    Decoded { width: info.width as usize, height: info.height as usize, bytes, facts }
}

impl Decoded {
    pub(crate) fn pixel(&self, y: usize, x: usize) -> [u8; 3] {
        self.bytes[(y * self.width + x) * 3..][..3].try_into().unwrap()
    }

    /// An image of the grid at its own size; checks that each of its pixels is a block of one colour.
    fn image(&self, row: usize, column: usize) -> Vec<[u8; 3]> {
        let places = &self.facts["places"];
        let number = |value: &serde_json::Value| value.as_u64().unwrap() as usize;
        let (top, left) = (number(&places["tops"][row]), number(&places["lefts"][column]));
        let scale = number(&places["cell"]) / SIDE;
        assert!(scale * SIDE >= 128);
        let mut image = Vec::new();
        for y in 0..SIDE {
            for x in 0..SIDE {
                let block = (0..scale * scale)
                    .map(|i| self.pixel(top + y * scale + i / scale, left + x * scale + i % scale));
                let colours: std::collections::BTreeSet<_> = block.collect();
                assert_eq!(colours.len(), 1, "pixel {y}, {x} is torn");
                image.extend(colours);
            }
        }
        image
    }
}

fn bytes_of(image: &[f32]) -> Vec<[u8; 3]> {
    let byte = |v: f32| (v * 255.0).round() as u8;
    image.chunks_exact(3).map(|p| [byte(p[0]), byte(p[1]), byte(p[2])]).collect()
}

fn masked_pixel(index: usize) -> bool {
    MASKED[index / SIDE / PATCH * 3 + index % SIDE / PATCH]
}

#[test]
fn a_perfect_prediction_is_drawn_in_the_colours_of_the_target() {
    for norm_pix in [false, true] {
        let image = example(norm_pix);
        let drawn = draw(&settings(norm_pix), 7, std::slice::from_ref(&image)).unwrap();
        // A biased variance would give 60 dB, channels in another order 10 dB.
        assert!(drawn.scores.prediction >= 99.0, "{:?}", drawn.scores);
        let grid = decode(&drawn.png);
        assert_eq!((grid.width, grid.height), (drawn.width, drawn.height));
        let columns: Vec<_> = (0..COLUMNS).map(|column| grid.image(0, column)).collect();
        let (pixels, target) = (bytes_of(&image.pixels), bytes_of(&image.target));
        assert_eq!(columns[0], pixels);
        assert_eq!(columns[1], target);
        let near = |a: [u8; 3], b: [u8; 3]| a.iter().zip(b).all(|(a, b)| a.abs_diff(b) <= 1);
        let grey = columns[2][0];
        let (no_error, visible) = (columns[5][0], columns[5][5]);
        for i in 0..SIDE * SIDE {
            assert!(near(columns[3][i], target[i]));
            if masked_pixel(i) {
                assert_eq!(columns[2][i], grey);
                assert!(near(columns[4][i], target[i]));
                assert!(near(columns[5][i], no_error));
            } else {
                assert_eq!(columns[2][i], pixels[i]);
                assert_eq!(columns[4][i], pixels[i]);
                assert_eq!(columns[5][i], visible);
            }
        }
        assert!(no_error.iter().all(|&c| c < 60) && visible.iter().all(|&c| c > 200));
    }
}

#[test]
fn with_norm_pix_a_prediction_of_zeros_scores_what_flat_patches_do() {
    let image = Reconstruction { prediction: vec![0.0; 675], ..example(true) };
    let scores = draw(&settings(true), 0, &[image]).unwrap().scores;
    assert_eq!(Some(scores.prediction), scores.flat_patches);
    assert_eq!(scores.baseline(), scores.prediction);
}

#[test]
fn scores_are_those_of_a_case_worked_by_hand() {
    // Target 0.5 everywhere; prediction 0.4 on masked patches, far off on visible ones. Visible pixels of the
    // input are 0.75, masked ones 0: the mean colour of the visible is 0.25 off.
    let normalised = |colour: f32, i: usize| (colour - MEAN[i % 3]) / STD[i % 3];
    let image = Reconstruction {
        pixels: (0..675).map(|i| if masked_pixel(i / 3) { 0.0 } else { 0.75 }).collect(),
        target: vec![0.5; 675],
        masked: MASKED.to_vec(),
        prediction: (0..675)
            .map(|i| normalised(if MASKED[i / 75] { 0.4 } else { 9.0 }, i))
            .collect(),
    };
    let near = Reconstruction {
        prediction: (0..675).map(|i| normalised(0.49, i)).collect(),
        ..image.clone()
    };
    let scores = draw(&settings(false), 0, std::slice::from_ref(&image)).unwrap().scores;
    assert!((scores.prediction - 20.0).abs() <= 1e-4, "{scores:?}");
    assert!((scores.mean_colour - -20.0 * 0.25_f64.log10()).abs() <= 1e-4, "{scores:?}");
    assert_eq!(scores.flat_patches, None);
    assert_eq!(scores.baseline(), scores.mean_colour);
    let both = draw(&settings(false), 0, &[image, near]).unwrap().scores;
    assert!((both.prediction - 30.0).abs() <= 1e-3, "the mean of 20 dB and 40 dB: {both:?}");
}

#[test]
fn larger_errors_are_lighter() {
    let mut image = example(false);
    let steps = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5];
    image.target = vec![0.5; 675];
    image.prediction = (0..675)
        .map(|i| {
            // Rows of the first patch, which is masked, are more and more wrong.
            let colour = if i < 75 { 0.5 - steps[i / 15 + 1] } else { 0.5 };
            (colour - MEAN[i % 3]) / STD[i % 3]
        })
        .collect();
    let grid = decode(&draw(&settings(false), 0, &[image]).unwrap().png);
    let error = grid.image(0, 5);
    let lightness =
        |[r, g, b]: [u8; 3]| 0.299 * f64::from(r) + 0.587 * f64::from(g) + 0.114 * f64::from(b);
    let rows: Vec<f64> = (0..5).map(|y| lightness(error[y * SIDE])).collect();
    assert!(rows.windows(2).all(|pair| pair[1] > pair[0] + 10.0), "{rows:?}");
}

#[test]
fn a_prediction_that_is_not_finite_is_drawn_and_has_no_score() {
    let mut image = example(true);
    image.prediction[3] = f32::NAN;
    let dir = tempfile::tempdir().unwrap();
    let drawn = draw(&settings(true), 3, &[image]).unwrap();
    assert!(drawn.scores.prediction.is_nan() && drawn.scores.mean_colour.is_finite());
    drawn.write(dir.path(), 3).unwrap();
    assert!(timeline::list(dir.path()).unwrap()[0].scores.prediction.is_nan());
}

#[test]
fn arrays_that_do_not_fit_are_refused_by_name() {
    let good = example(false);
    let refused = |image: Reconstruction| {
        draw(&settings(false), 0, &[image]).map(|_| ()).unwrap_err().to_string()
    };
    let error = refused(Reconstruction { pixels: vec![0.0; 674], ..good.clone() });
    assert!(error.contains("`pixels`") && error.contains("675"), "{error}");
    assert!(refused(Reconstruction { target: vec![], ..good.clone() }).contains("`target`"));
    assert!(
        refused(Reconstruction { prediction: vec![], ..good.clone() }).contains("`prediction`")
    );
    assert!(refused(Reconstruction { masked: vec![true; 8], ..good.clone() }).contains("`masked`"));
    for masked in [vec![true; 9], vec![false; 9]] {
        assert!(refused(Reconstruction { masked, ..good.clone() }).contains("`masked` must"));
    }
    assert!(draw(&settings(false), 0, &[]).is_err());
    let odd = Settings { patch_size: 4, ..settings(false) };
    assert!(draw(&odd, 0, &[good]).unwrap_err().to_string().contains("`patch_size` 4 does not"));
}

/// Pictures of steps 0, 5, 10, .. with `rows` images; the prediction of step `n` is `n / 255` everywhere.
pub(crate) fn write_pictures(dir: &Path, count: u64, rows: usize) -> Vec<Picture> {
    let mut pictures = Vec::new();
    for step in (0..count).map(|n| 5 * n) {
        let grey = |i: usize| (step as f32 / 255.0 - MEAN[i % 3]) / STD[i % 3];
        let image = Reconstruction { prediction: (0..675).map(grey).collect(), ..example(false) };
        let picture = draw(&settings(false), step, &vec![image; rows]).unwrap();
        picture.write(dir, step).unwrap();
        pictures.push(picture);
    }
    pictures
}

#[test]
fn saved_pictures_are_found_in_order_with_their_scores_and_other_files_are_left_out() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(timeline::list(&dir.path().join("missing")).unwrap(), []);
    let pictures = write_pictures(dir.path(), 3, 2);
    fs::write(dir.path().join("step-00000007.png"), "no picture").unwrap();
    fs::write(dir.path().join("notes.txt"), "").unwrap();
    let found = timeline::list(dir.path()).unwrap();
    assert_eq!(found.iter().map(|saved| saved.step).collect::<Vec<_>>(), [0, 5, 10]);
    for (saved, picture) in found.iter().zip(&pictures) {
        let (a, b) = (saved.scores, picture.scores);
        assert!((a.prediction - b.prediction).abs() <= 1e-9);
        assert!((a.mean_colour - b.mean_colour).abs() <= 1e-9);
        assert_eq!(a.flat_patches, None);
    }
}

#[test]
fn the_timeline_shows_original_steps_and_target() {
    let dir = tempfile::tempdir().unwrap();
    write_pictures(dir.path(), 1, 3);
    let one = timeline::list(dir.path()).unwrap();
    assert_eq!(timeline::write(dir.path(), &one, 2).unwrap(), None);

    write_pictures(dir.path(), 30, 3);
    // A picture of a run with more images has another size: it is left out.
    draw(&settings(false), 11, &vec![example(false); 5]).unwrap().write(dir.path(), 11).unwrap();
    let saved = timeline::list(dir.path()).unwrap();
    let path = timeline::write(dir.path(), &saved, 2).unwrap().unwrap();
    let strip = decode(&fs::read(&path).unwrap());
    let cell = 12 * SIDE;
    assert_eq!(strip.width, 2 * 28 + 8 * cell + 7 * 10);
    // The first patch is masked: it has the colour of its step.
    let top = strip.height - 28 - cell;
    let colours: Vec<u8> =
        (1..7).map(|column| strip.pixel(top, 28 + column * (cell + 10))[0]).collect();
    assert_eq!(colours, [0, 5, 25, 50, 95, 145], "the first, the last, and more early ones");
    let example = example(false);
    assert_eq!(strip.pixel(top, 28), bytes_of(&example.pixels)[0]);
    assert_eq!(strip.pixel(top, 28 + 7 * (cell + 10)), bytes_of(&example.target)[0]);
}
