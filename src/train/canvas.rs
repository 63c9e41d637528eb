//! An RGB picture to draw on: rectangles, images enlarged by whole factors, and text.

use super::font;
use crate::{Error, Result};

/// Red, green, blue.
pub(super) type Rgb = [u8; 3];

/// An RGB picture, row-major.
pub(super) struct Canvas {
    width: usize,
    height: usize,
    pixels: Vec<u8>,
}

impl Canvas {
    pub(super) fn new(width: usize, height: usize, paper: Rgb) -> Self {
        Self { width, height, pixels: paper.repeat(width * height) }
    }

    /// Fills a rectangle; what lies outside the canvas is left out.
    pub(super) fn fill(
        &mut self,
        left: usize,
        top: usize,
        width: usize,
        height: usize,
        colour: Rgb,
    ) {
        let right = (left + width).min(self.width);
        let bottom = (top + height).min(self.height);
        for y in top..bottom {
            for x in left..right {
                self.pixels[(y * self.width + x) * 3..][..3].copy_from_slice(&colour);
            }
        }
    }

    /// Draws a square image of `side` pixels, `colour(y, x)` each, enlarged `scale` times.
    pub(super) fn square(
        &mut self,
        left: usize,
        top: usize,
        side: usize,
        scale: usize,
        colour: impl Fn(usize, usize) -> Rgb,
    ) {
        for y in 0..side {
            for x in 0..side {
                self.fill(left + x * scale, top + y * scale, scale, scale, colour(y, x));
            }
        }
    }

    /// Writes one line of text, its capitals' top left corner at `left`, `top`; each dot is `scale` pixels wide.
    pub(super) fn text(&mut self, left: usize, top: usize, scale: usize, ink: Rgb, text: &str) {
        for (index, character) in text.chars().enumerate() {
            let (rows, drop) = font::glyph(character);
            let left = left + index * advance(scale);
            for (y, row) in rows.into_iter().enumerate() {
                for x in (0..font::WIDTH).filter(|x| row >> (font::WIDTH - 1 - x) & 1 == 1) {
                    let top = top + (y + drop) * scale;
                    self.fill(left + x * scale, top, scale, scale, ink);
                }
            }
        }
    }

    /// The canvas as a PNG file with the text `value` under `keyword`.
    pub(super) fn png(&self, keyword: &str, value: &str) -> Result<Vec<u8>> {
        let mut file = Vec::new();
        let encode = |file: &mut Vec<u8>| {
            let mut encoder = png::Encoder::new(file, self.width as u32, self.height as u32);
            encoder.set_color(png::ColorType::Rgb);
            encoder.set_depth(png::BitDepth::Eight);
            // A row of an enlarged image often equals the row above: then this filter leaves zeros.
            encoder.set_filter(png::Filter::Up);
            encoder.add_text_chunk(keyword.into(), value.into())?;
            let mut writer = encoder.write_header()?;
            writer.write_image_data(&self.pixels)?;
            writer.finish()
        };
        encode(&mut file).map_err(|error| {
            Error::invalid("picture", format!("cannot be encoded as PNG: {error}"))
        })?;
        Ok(file)
    }
}

/// Pixels from one character to the next.
pub(super) const fn advance(scale: usize) -> usize {
    (font::WIDTH + 1) * scale
}

/// Pixels from the top of capitals to the lowest descender.
pub(super) const fn line_height(scale: usize) -> usize {
    (font::HEIGHT + font::DESCENT) * scale
}

/// `text` in lines of at most `width` pixels, broken at spaces; a longer word stands alone and reaches out.
pub(super) fn wrap(text: &str, scale: usize, width: usize) -> Vec<String> {
    let most = width / advance(scale);
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.chars().count() + 1 + word.chars().count() <= most => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_drawn_dot_by_dot_and_descenders_reach_below_the_base_line() {
        let mut canvas = Canvas::new(12, 9, [255; 3]);
        canvas.text(0, 0, 1, [0; 3], "Lg");
        let drawn: Vec<String> = canvas
            .pixels
            .chunks_exact(12 * 3)
            .map(|row| row.chunks_exact(3).map(|p| if p[0] == 0 { '#' } else { '.' }).collect())
            .collect();
        let expected = [
            "#...........",
            "#...........",
            "#......####.",
            "#.....#...#.",
            "#.....#...#.",
            "#.....#...#.",
            "#####..####.",
            "..........#.",
            ".......###..",
        ];
        assert_eq!(drawn, expected);
    }

    #[test]
    fn every_printable_character_has_a_shape_of_its_own() {
        let glyphs: Vec<_> = (' '..='~').map(font::glyph).collect();
        for (i, a) in glyphs.iter().enumerate() {
            assert!(a.0.iter().all(|row| *row < 32));
            assert!(glyphs[..i].iter().all(|b| a != b), "glyph {i} is drawn twice");
        }
        assert_eq!(font::glyph('é'), font::glyph('?'));
    }

    #[test]
    fn lines_break_at_spaces_within_the_width() {
        assert_eq!(wrap("low-pass r=11.4", 2, 12 * 8), ["low-pass", "r=11.4"]);
        assert_eq!(wrap("low-pass r=11.4", 2, 12 * 15), ["low-pass r=11.4"]);
        assert_eq!(wrap("unbreakable x", 1, 12), ["unbreakable", "x"]);
    }
}
