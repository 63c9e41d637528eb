//! Pictures over time: those that a run has saved, and one strip of the same images at different steps.

use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};

use super::canvas::{Canvas, Rgb};
use super::files::write_atomic;
use super::pictures::{
    Facts, GAP, INK, KEYWORD, LINE, MARGIN, ORIGINAL, PAPER, PASTED, Places, SMALL, Scores, TARGET,
};
use crate::{Error, Result};

/// A picture found in a folder.
#[derive(Clone, Debug, PartialEq)]
pub struct Saved {
    /// The file.
    pub path: PathBuf,
    /// Updates done when it was drawn.
    pub step: u64,
    /// Mean over its images.
    pub scores: Scores,
    places: Places,
}

/// The pictures of the folder `dir`, earliest first. Files that [`Picture::write`](super::pictures::Picture::write) did
/// not write are left out.
///
/// # Errors
/// [`Error::Io`] when the folder cannot be read; one that does not exist holds no pictures.
pub fn list(dir: &Path) -> Result<Vec<Saved>> {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::io("read", dir)(error)),
    };
    let mut saved = Vec::new();
    for entry in entries {
        let path = entry.map_err(Error::io("read", dir))?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if name.starts_with("step-") && name.ends_with(".png") {
            saved.extend(facts(&path).map(|Facts { step, scores, places }| Saved {
                path,
                step,
                scores,
                places,
            }));
        }
    }
    saved.sort_by_key(|picture| picture.step);
    Ok(saved)
}

/// The facts in the head of a picture's file, if it is one.
fn facts(path: &Path) -> Option<Facts> {
    let reader = png::Decoder::new(BufReader::new(File::open(path).ok()?)).read_info().ok()?;
    let info = reader.info();
    let chunk = info.uncompressed_latin1_text.iter().find(|chunk| chunk.keyword == KEYWORD)?;
    let facts: Facts = serde_json::from_str(&chunk.text).ok()?;
    let Places { cell, lefts, tops } = &facts.places;
    let inside = |edges: &[usize], length: u32| {
        edges.iter().all(|edge| edge.saturating_add(*cell) <= length as usize)
    };
    let rgb = (info.color_type, info.bit_depth) == (png::ColorType::Rgb, png::BitDepth::Eight);
    (rgb && inside(lefts, info.width) && inside(tops, info.height)).then_some(facts)
}

/// At most `count` of `len` indices: the first, the last, and between them more of the early ones, where a network
/// changes most.
pub(super) fn early_heavy(len: usize, count: usize) -> Vec<usize> {
    if len <= count {
        return (0..len).collect();
    }
    let mut chosen: Vec<usize> = Vec::with_capacity(count);
    for k in 0..count {
        let share = k as f64 / (count - 1) as f64;
        let even = ((len - 1) as f64 * share * share).round() as usize;
        chosen.push(chosen.last().map_or(even, |last| even.max(last + 1)));
    }
    chosen
}

/// Steps in a timeline.
const TIMELINE_STEPS: usize = 6;

/// Draws the same few images over time into `dir`, as `timeline.png`: the original, "prediction + visible patches" of
/// some of the pictures, the target. None when fewer than two pictures are alike in size.
///
/// # Errors
/// [`Error::Io`], [`Error::Corrupt`] when a picture cannot be read.
pub fn write(dir: &Path, pictures: &[Saved], images: usize) -> Result<Option<PathBuf>> {
    let Some(last) = pictures.last() else { return Ok(None) };
    // A run that was resumed with another config may hold pictures of another size.
    let alike: Vec<&Saved> = pictures.iter().filter(|saved| saved.places == last.places).collect();
    if alike.len() < 2 {
        return Ok(None);
    }
    let Places { cell, lefts, tops } = &last.places;
    let rows = tops.len().min(images);
    let steps = early_heavy(alike.len(), TIMELINE_STEPS);
    let columns = steps.len() + 2;
    let rows_top = MARGIN + LINE + 4;
    let mut canvas = Canvas::new(
        2 * MARGIN + columns * (cell + GAP) - GAP,
        rows_top + rows * (cell + GAP) - GAP + MARGIN,
        PAPER,
    );
    let mut column = 0;
    let mut copy = |title: &str, from: &Pixels, source: usize| {
        let left = MARGIN + column * (cell + GAP);
        canvas.text(left, MARGIN, SMALL, INK, title);
        for (row, top) in tops[..rows].iter().enumerate() {
            canvas.square(left, rows_top + row * (cell + GAP), *cell, 1, |y, x| {
                from.at(top + y, lefts[source] + x)
            });
        }
        column += 1;
    };
    let final_pixels = Pixels::read(&last.path)?;
    copy("original", &final_pixels, ORIGINAL);
    for index in steps {
        copy(&format!("step {}", alike[index].step), &Pixels::read(&alike[index].path)?, PASTED);
    }
    copy("target", &final_pixels, TARGET);
    let path = dir.join("timeline.png");
    write_atomic(&path, &canvas.png("Title", "reconstructions over time")?)?;
    Ok(Some(path))
}

/// A decoded picture.
struct Pixels {
    width: usize,
    bytes: Vec<u8>,
}

impl Pixels {
    fn read(path: &Path) -> Result<Self> {
        let damaged = |error: png::DecodingError| match error {
            png::DecodingError::IoError(error) => Error::io("read", path)(error),
            other => Error::corrupt(path, format!("{other}; delete it to go on without it")),
        };
        let file = File::open(path).map_err(Error::io("read", path))?;
        let mut reader = png::Decoder::new(BufReader::new(file)).read_info().map_err(damaged)?;
        let mut bytes = vec![0; reader.output_buffer_size().unwrap_or(0)];
        let info = reader.next_frame(&mut bytes).map_err(damaged)?;
        Ok(Self { width: info.width as usize, bytes })
    }

    fn at(&self, y: usize, x: usize) -> Rgb {
        let at = 3 * (y * self.width + x);
        [self.bytes[at], self.bytes[at + 1], self.bytes[at + 2]]
    }
}
