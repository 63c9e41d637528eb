//! Pictures of what the network has learned: fixed images, their targets, and what it makes of the masked patches.
//!
//! With `norm_pix` the network predicts each patch of the target with that patch's own mean and variance removed. To
//! show it in colours they have to be put back, so a prediction knows the mean and contrast of every patch from the
//! target: even a prediction of zeros looks like a mosaic of the image. The picture says so, and compares the
//! prediction with exactly that mosaic ("flat patches") beside the usual fill with one mean colour.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::canvas::{Canvas, Rgb, line_height, wrap};
use super::files::write_atomic;
use super::metrics::null_is_nan;
use crate::scalar::{NORM_PIX_EPS, patch_corner, patch_of};
use crate::{Error, Result};

/// One image and what the network made of it. `S` is the side of the image, `p` of a patch, `L = (S / p)^2`.
#[derive(Clone, Debug)]
pub struct Reconstruction {
    /// The crop that was masked: `(S, S, 3)`, colours in [0, 1].
    pub pixels: Vec<f32>,
    /// What the network is to predict, before `norm_pix`: `(S, S, 3)`, colours in [0, 1]; for a raw target the same as
    /// `pixels`.
    pub target: Vec<f32>,
    /// `(L)`, patches row by row: true where the encoder did not see the patch.
    pub masked: Vec<bool>,
    /// The network's output for every patch: `(L, p * p * 3)`, each in the order row, column, channel.
    pub prediction: Vec<f32>,
}

/// What the numbers of a [`Reconstruction`] mean.
#[derive(Clone, Debug)]
pub struct Settings<'a> {
    /// Side of the square images, in pixels.
    pub image_size: usize,
    /// Side of a patch, in pixels; divides `image_size`.
    pub patch_size: usize,
    /// Mean of the colours that inputs and targets are normalised with.
    pub mean: [f32; 3],
    /// Standard deviation that goes with `mean`.
    pub std: [f32; 3],
    /// Whether the prediction is of patches normalised by their own mean and variance.
    pub norm_pix: bool,
    /// What the target is, in a few words: "low-pass r=11.4", "raw pixels".
    pub target: &'a str,
}

/// How near the masked pixels of a prediction are to the target's, as peak signal-to-noise ratios in dB for colours
/// in [0, 1], clamped as they are shown; at most 100. Over several images: their mean.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Scores {
    /// Of the network's prediction; NaN if that is not finite.
    #[serde(deserialize_with = "null_is_nan")]
    pub prediction: f64,
    /// Of a fill with one colour: the mean of the visible pixels.
    #[serde(deserialize_with = "null_is_nan")]
    pub mean_colour: f64,
    /// Of a prediction of zeros, where `norm_pix` gives each patch its true mean; none without `norm_pix`.
    pub flat_patches: Option<f64>,
}

impl Scores {
    /// What a network that has learned nothing reaches: the fair thing to compare `prediction` with.
    #[must_use]
    pub fn baseline(&self) -> f64 {
        self.flat_patches.unwrap_or(self.mean_colour)
    }

    fn words(&self) -> String {
        let flat = self.flat_patches.map(|db| format!("flat patches {}, ", decibels(db)));
        format!(
            "masked PSNR {} ({}mean colour {})",
            decibels(self.prediction),
            flat.unwrap_or_default(),
            decibels(self.mean_colour)
        )
    }
}

/// A picture as a PNG file.
#[derive(Clone, Debug)]
pub struct Picture {
    /// The file.
    pub png: Vec<u8>,
    /// Columns.
    pub width: usize,
    /// Rows.
    pub height: usize,
    /// Mean over the images.
    pub scores: Scores,
}

impl Picture {
    /// Writes the picture into `dir`, as `step-<step>.png`, whole or not at all.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn write(&self, dir: &Path, step: u64) -> Result<PathBuf> {
        let path = dir.join(format!("step-{step:08}.png"));
        write_atomic(&path, &self.png)?;
        Ok(path)
    }
}

/// What a picture says about itself, in a text chunk of the PNG: what [`list`](super::timeline::list) reads back.
#[derive(Serialize, Deserialize)]
pub(super) struct Facts {
    pub(super) step: u64,
    pub(super) scores: Scores,
    pub(super) places: Places,
}

/// Keyword of the text chunk that holds [`Facts`].
pub(super) const KEYWORD: &str = "pixmim";

/// Where the images of a picture are, in pixels.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Places {
    /// Side of an image, enlarged.
    pub(super) cell: usize,
    /// Left edges of the columns.
    pub(super) lefts: [usize; COLUMNS],
    /// Top edges of the rows.
    pub(super) tops: Vec<usize>,
}

pub(super) const PAPER: Rgb = [255, 255, 255];
pub(super) const INK: Rgb = [28, 32, 38];
const FAINT_INK: Rgb = [96, 104, 114];
/// Patches that the encoder does not see.
const MASKED: Rgb = [142, 146, 152];
/// Patches that have no error.
const UNSUPERVISED: Rgb = [232, 234, 237];

pub(super) const MARGIN: usize = 28;
/// Between columns.
pub(super) const GAP: usize = 10;
/// An image is enlarged until it is at least this wide, so that the captions fit and patches can be seen.
const MIN_CELL: usize = 168;
/// Size of a dot of the captions' letters.
pub(super) const SMALL: usize = 2;
const LARGE: usize = 3;
/// From one line of text to the next.
pub(super) const LINE: usize = line_height(SMALL) + 6;
/// Between rows: caption and air.
const ROW_GAP: usize = LINE + 22;

pub(super) const ORIGINAL: usize = 0;
pub(super) const TARGET: usize = 1;
const INPUT: usize = 2;
const PREDICTION: usize = 3;
pub(super) const PASTED: usize = 4;
const ERROR: usize = 5;
const COLUMNS: usize = 6;

/// Draws one row per image: original, target, masked input, prediction, prediction with the visible patches pasted
/// in, and the error of the masked patches.
///
/// # Errors
/// [`Error::Shape`] when an array does not fit the settings, [`Error::Invalid`] when there is no image, or one has no
/// masked or no visible patch.
pub fn draw(settings: &Settings<'_>, step: u64, images: &[Reconstruction]) -> Result<Picture> {
    if images.is_empty() {
        return Err(Error::invalid("images", "holds none to draw; give at least one"));
    }
    let shown =
        images.iter().map(|image| Shown::new(settings, image)).collect::<Result<Vec<_>>>()?;
    let scores = mean_scores(&shown);

    let side = settings.image_size;
    let scale = MIN_CELL.div_ceil(side);
    let cell = side * scale;
    let width = 2 * MARGIN + COLUMNS * cell + (COLUMNS - 1) * GAP;
    let masked = images[0].masked.iter().filter(|&&masked| masked).count();
    let patches = images[0].masked.len();
    let share = 100.0 * masked as f64 / patches as f64;
    let over =
        if images.len() == 1 { String::new() } else { format!("mean of {}: ", images.len()) };
    let head = [
        format!("{masked} of {patches} patches masked ({share:.0} %), target: {}", settings.target),
        over + &scores.words(),
    ];
    let titles = [
        "original".to_owned(),
        format!("target: {}", settings.target),
        "masked input".into(),
        "prediction".into(),
        "prediction + visible".into(),
        "error of masked".into(),
    ];
    let inner = width - 2 * MARGIN;
    let head: Vec<String> = head.iter().flat_map(|line| wrap(line, SMALL, inner)).collect();
    let titles = titles.map(|title| wrap(&title, SMALL, cell));
    let title_lines = titles.iter().map(Vec::len).max().unwrap_or(0);
    let notes = wrap(&notes(settings.norm_pix), SMALL, inner - cell - 2 * GAP);

    let head_top = MARGIN + line_height(LARGE) + 12;
    let titles_top = head_top + head.len() * LINE + 18;
    let rows_top = titles_top + title_lines * LINE + 4;
    let foot_top = rows_top + shown.len() * (cell + ROW_GAP) + 8;
    let height = foot_top + notes.len().max(3) * LINE + MARGIN;
    let places = Places {
        cell,
        lefts: std::array::from_fn(|column| MARGIN + column * (cell + GAP)),
        tops: (0..shown.len()).map(|row| rows_top + row * (cell + ROW_GAP)).collect(),
    };

    let mut canvas = Canvas::new(width, height, PAPER);
    canvas.text(MARGIN, MARGIN, LARGE, INK, &format!("step {step}"));
    lines(&mut canvas, MARGIN, head_top, FAINT_INK, &head);
    for (title, &left) in titles.iter().zip(&places.lefts) {
        // Titles of one line stand on the images, beside the last line of longer ones.
        let top = titles_top + (title_lines - title.len()) * LINE;
        lines(&mut canvas, left, top, INK, title);
    }
    for (image, &top) in shown.iter().zip(&places.tops) {
        for (column, &left) in places.lefts.iter().enumerate() {
            canvas.square(left, top, side, scale, |y, x| image.colour(column, y, x));
        }
        canvas.text(MARGIN, top + cell + 8, SMALL, FAINT_INK, &image.scores.words());
    }
    lines(&mut canvas, MARGIN, foot_top, FAINT_INK, &notes);
    error_scale(&mut canvas, places.lefts[ERROR], foot_top, cell);

    let facts = serde_json::to_string(&Facts { step, scores, places })
        .map_err(|error| Error::invalid("picture", error.to_string()))?;
    Ok(Picture { png: canvas.png(KEYWORD, &facts)?, width, height, scores })
}

fn notes(norm_pix: bool) -> String {
    let mut notes =
        "The loss is on masked patches only: visible patches of the prediction are not supervised \
                     and may look like anything. PSNR compares masked patches with the target."
            .to_owned();
    if norm_pix {
        notes.push_str(
            " norm_pix is on: the mean and contrast of each predicted patch are taken from the target, the \
             network predicts the pattern only. 'flat patches' is what a prediction of nothing reaches with them.",
        );
    }
    notes
}

fn lines(canvas: &mut Canvas, left: usize, top: usize, ink: Rgb, lines: &[String]) {
    for (index, line) in lines.iter().enumerate() {
        canvas.text(left, top + index * LINE, SMALL, ink, line);
    }
}

fn decibels(value: f64) -> String {
    if value.is_nan() { "n/a".into() } else { format!("{value:.2} dB") }
}

/// Largest error that the colours tell apart: fixed, so that pictures of different steps compare.
const MAX_ERROR: f32 = 0.5;

/// From no error to [`MAX_ERROR`]. Lightness rises evenly, so it reads without hue and in grey.
const ERROR_RAMP: [Rgb; 6] =
    [[12, 10, 40], [68, 24, 108], [150, 40, 100], [218, 84, 62], [246, 158, 50], [252, 244, 176]];

fn error_colour(error: f32) -> Rgb {
    let at = (error / MAX_ERROR).clamp(0.0, 1.0) * (ERROR_RAMP.len() - 1) as f32;
    // A prediction that is not a number is as wrong as can be.
    let at = if at.is_nan() { (ERROR_RAMP.len() - 1) as f32 } else { at };
    let low = (at as usize).min(ERROR_RAMP.len() - 2);
    let share = at - low as f32;
    let (a, b) = (ERROR_RAMP[low], ERROR_RAMP[low + 1]);
    [0, 1, 2].map(|c| (f32::from(a[c]) * (1.0 - share) + f32::from(b[c]) * share).round() as u8)
}

fn error_scale(canvas: &mut Canvas, left: usize, top: usize, width: usize) {
    for x in 0..width {
        let error = MAX_ERROR * x as f32 / (width - 1) as f32;
        canvas.fill(left + x, top, 1, 14, error_colour(error));
    }
    canvas.text(left, top + 22, SMALL, FAINT_INK, "0");
    let most = format!("{MAX_ERROR}+");
    let most_width = most.len() * super::canvas::advance(SMALL) - SMALL;
    canvas.text(left + width - most_width, top + 22, SMALL, FAINT_INK, &most);
    canvas.text(left, top + 22 + LINE, SMALL, FAINT_INK, "of colours 0..1");
}

/// An image, ready to be drawn.
struct Shown<'a> {
    settings: &'a Settings<'a>,
    image: &'a Reconstruction,
    /// `(S, S, 3)`: the prediction in colours, clamped to [0, 1].
    prediction: Vec<f32>,
    scores: Scores,
}

impl<'a> Shown<'a> {
    fn new(settings: &'a Settings<'a>, image: &'a Reconstruction) -> Result<Self> {
        let masked_pixels = check(settings, image)?;
        let prediction = in_colours(settings, image, &image.prediction);
        let mean_colour = visible_mean(settings, image);
        let psnr_to_target = |colours: &dyn Fn(usize) -> f32| {
            let squares = masked_pixels.iter().flat_map(|&pixel| {
                (3 * pixel..3 * pixel + 3)
                    .map(|at| f64::from(colours(at) - image.target[at]).powi(2))
            });
            psnr(squares.sum::<f64>() / (3 * masked_pixels.len()) as f64)
        };
        let flat = settings.norm_pix.then(|| {
            let flat = in_colours(settings, image, &vec![0.0; image.prediction.len()]);
            psnr_to_target(&|at| flat[at])
        });
        let scores = Scores {
            prediction: psnr_to_target(&|at| prediction[at]),
            mean_colour: psnr_to_target(&|at| mean_colour[at % 3]),
            flat_patches: flat,
        };
        Ok(Self { settings, image, prediction, scores })
    }

    fn colour(&self, column: usize, y: usize, x: usize) -> Rgb {
        let Settings { image_size, patch_size, .. } = *self.settings;
        let masked = self.image.masked[patch_of(y, x, image_size / patch_size, patch_size)];
        let at = 3 * (y * image_size + x);
        let colour_of = |image: &[f32]| [0, 1, 2].map(|c| byte(image[at + c]));
        match (column, masked) {
            (ORIGINAL, _) | (INPUT | PASTED, false) => colour_of(&self.image.pixels),
            (TARGET, _) => colour_of(&self.image.target),
            (INPUT, true) => MASKED,
            (PREDICTION, _) | (PASTED, true) => colour_of(&self.prediction),
            (_, false) => UNSUPERVISED,
            (_, true) => {
                let difference =
                    |c: usize| (self.prediction[at + c] - self.image.target[at + c]).abs();
                error_colour((difference(0) + difference(1) + difference(2)) / 3.0)
            }
        }
    }
}

/// Checks the shapes; the indices of the masked pixels.
fn check(settings: &Settings<'_>, image: &Reconstruction) -> Result<Vec<usize>> {
    let Settings { image_size: side, patch_size, .. } = *settings;
    if patch_size == 0 || side == 0 || side % patch_size != 0 {
        let why = format!("{patch_size} does not divide the image size {side}");
        return Err(Error::invalid("patch_size", why));
    }
    let patches = (side / patch_size).pow(2);
    for (arg, found, expected) in [
        ("pixels", image.pixels.len(), side * side * 3),
        ("target", image.target.len(), side * side * 3),
        ("masked", image.masked.len(), patches),
        ("prediction", image.prediction.len(), side * side * 3),
    ] {
        if found != expected {
            let expected = format!("{expected} numbers");
            return Err(Error::Shape { op: "pictures", arg, expected, found: vec![found] });
        }
    }
    let masked_pixels: Vec<usize> = (0..side * side)
        .filter(|at| image.masked[patch_of(at / side, at % side, side / patch_size, patch_size)])
        .collect();
    if masked_pixels.is_empty() || masked_pixels.len() == side * side {
        return Err(Error::invalid("masked", "must leave some patches masked and some visible"));
    }
    Ok(masked_pixels)
}

/// Index of the patch that a pixel is in.
/// Network output `(L, p * p * 3)` as colours `(S, S, 3)`, clamped to [0, 1]: with `norm_pix` the statistics of the
/// target's patches are put back first, then the normalisation of the colours is undone.
fn in_colours(settings: &Settings<'_>, image: &Reconstruction, output: &[f32]) -> Vec<f32> {
    let Settings { image_size: side, patch_size: p, mean, std, norm_pix, .. } = *settings;
    let grid = side / p;
    let mut colours = vec![0.0; side * side * 3];
    for patch in 0..grid * grid {
        // Where number `i` of the patch, in the order row, column, channel, stands in an image.
        let at = |i: usize| {
            let (top, left) = patch_corner(patch, grid, p);
            let (y, x) = (top + i / (3 * p), left + i / 3 % p);
            3 * (y * side + x) + i % 3
        };
        let numbers = p * p * 3;
        let (patch_mean, patch_std) = if norm_pix {
            let normalised = |i: usize| f64::from((image.target[at(i)] - mean[i % 3]) / std[i % 3]);
            let patch_mean = (0..numbers).map(normalised).sum::<f64>() / numbers as f64;
            let squares = (0..numbers).map(|i| (normalised(i) - patch_mean).powi(2)).sum::<f64>();
            // The unbiased variance and the epsilon of MAE's loss.
            (patch_mean as f32, (squares / (numbers - 1) as f64 + NORM_PIX_EPS).sqrt() as f32)
        } else {
            (0.0, 1.0)
        };
        for i in 0..numbers {
            let normalised = output[patch * numbers + i] * patch_std + patch_mean;
            colours[at(i)] = (normalised * std[i % 3] + mean[i % 3]).clamp(0.0, 1.0);
        }
    }
    colours
}

/// Mean colour of the visible pixels.
fn visible_mean(settings: &Settings<'_>, image: &Reconstruction) -> [f32; 3] {
    let Settings { image_size: side, patch_size, .. } = *settings;
    let mut sum = [0.0_f64; 3];
    let mut count = 0;
    for (at, pixel) in image.pixels.chunks_exact(3).enumerate() {
        if !image.masked[patch_of(at / side, at % side, side / patch_size, patch_size)] {
            count += 1;
            for (sum, &value) in sum.iter_mut().zip(pixel) {
                *sum += f64::from(value);
            }
        }
    }
    sum.map(|sum| (sum / f64::from(count)) as f32)
}

/// Peak signal-to-noise ratio in dB of a mean squared error, for a peak of 1.
fn psnr(mean_square: f64) -> f64 {
    // `clamp`, unlike `max`, keeps a NaN.
    -10.0 * mean_square.clamp(1e-10, f64::INFINITY).log10()
}

fn mean_scores(shown: &[Shown<'_>]) -> Scores {
    let mean = |of: &dyn Fn(&Scores) -> f64| {
        shown.iter().map(|image| of(&image.scores)).sum::<f64>() / shown.len() as f64
    };
    Scores {
        prediction: mean(&|scores| scores.prediction),
        mean_colour: mean(&|scores| scores.mean_colour),
        flat_patches: shown[0].scores.flat_patches.map(|_| mean(&Scores::baseline)),
    }
}

fn byte(colour: f32) -> u8 {
    (colour.clamp(0.0, 1.0) * 255.0).round() as u8
}
