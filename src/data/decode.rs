//! Decoding of JPEG, PNG and WebP into RGB bytes, as Pillow's `Image.open(..).convert("RGB")` has it.
//!
//! The format is told by the first bytes, never by a file's name: ImageNet holds a PNG named `.JPEG`. Sizes are judged
//! from the header, before memory for pixels is taken. Grey, CMYK and YCCK become RGB; alpha is dropped without
//! blending; of 16 bits per channel the high 8 are kept; of an animation the first frame. Colour profiles are ignored.
//! A truncated file is an error, not a picture with a grey bottom.

use std::io::{Cursor, ErrorKind};

use zune_core::bytestream::{ZByteIoError, ZCursor};
use zune_core::colorspace::ColorSpace;
use zune_core::options::DecoderOptions;
use zune_jpeg::JpegDecoder;
use zune_jpeg::errors::DecodeErrors as JpegError;

use crate::data::Image;
use crate::train::config;

/// What is accepted, and how it is turned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Largest file, in bytes.
    pub max_file_bytes: u64,
    /// Longest side, in pixels.
    pub max_side: usize,
    /// Most pixels.
    pub max_pixels: usize,
    /// Turn and mirror images as their EXIF orientation says.
    pub exif_orientation: bool,
}

/// Largest ratio of the sides: with its short side resized to that of a crop, a longer image would fill the memory.
pub(super) const MAX_ASPECT: usize = 100;

impl Default for Options {
    /// 64 MiB, 16,384 pixels a side, 2^26 pixels, orientation ignored.
    fn default() -> Self {
        Self {
            max_file_bytes: 64 << 20,
            max_side: 16_384,
            max_pixels: 64 << 20,
            exif_orientation: false,
        }
    }
}

impl From<&config::Data> for Options {
    fn from(data: &config::Data) -> Self {
        Self {
            max_file_bytes: (data.max_file_mib as u64).saturating_mul(1 << 20),
            max_side: data.max_side,
            max_pixels: data.max_mebipixels.saturating_mul(1 << 20),
            exif_orientation: data.exif_orientation,
        }
    }
}

impl Options {
    /// Refuses a file of more bytes than allowed.
    ///
    /// # Errors
    /// [`DecodeError::TooLarge`].
    pub fn check_file(&self, bytes: u64) -> Result<(), DecodeError> {
        if bytes > self.max_file_bytes {
            return Err(DecodeError::TooLarge(format!(
                "{bytes} bytes; data.max_file_mib allows {}",
                self.max_file_bytes
            )));
        }
        Ok(())
    }

    fn check_size(&self, height: usize, width: usize) -> Result<(), DecodeError> {
        let allows = if height.max(width) > self.max_side {
            format!("data.max_side allows {}", self.max_side)
        } else if height.saturating_mul(width) > self.max_pixels {
            format!("data.max_mebipixels allows {} pixels", self.max_pixels)
        } else if height.max(width) > MAX_ASPECT * height.min(width) {
            format!("its sides may differ {MAX_ASPECT}-fold")
        } else {
            return Ok(());
        };
        Err(DecodeError::TooLarge(format!("{width} x {height} pixels; {allows}")))
    }
}

/// Why bytes did not become an image.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// Bytes of no known format.
    #[error("not an image: {0}")]
    NotAnImage(String),
    /// An image of a format that is not read.
    #[error("a {0} image: convert it to JPEG, PNG or WebP")]
    Unsupported(&'static str),
    /// More bytes or pixels than allowed.
    #[error("too large: {0}")]
    TooLarge(String),
    /// A file that ends too early.
    #[error("truncated {0}")]
    Truncated(&'static str),
    /// A file that its decoder refuses.
    #[error("damaged {format}: {why}")]
    Damaged {
        /// Its format.
        format: &'static str,
        /// The decoder's words.
        why: String,
    },
}

/// Decodes a file held in memory.
///
/// # Errors
/// [`DecodeError`]: not an image, too large, truncated or damaged. Never panics, whatever the bytes.
pub fn decode(bytes: &[u8], options: &Options) -> Result<Image, DecodeError> {
    options.check_file(bytes.len() as u64)?;
    let (image, exif) = match bytes {
        [0xFF, 0xD8, 0xFF, ..] => jpeg(bytes, options)?,
        [0x89, b'P', b'N', b'G', 0x0D, 0x0A, 0x1A, 0x0A, ..] => png(bytes, options)?,
        [b'R', b'I', b'F', b'F', _, _, _, _, b'W', b'E', b'B', b'P', ..] => webp(bytes, options)?,
        _ => return Err(unknown(bytes)),
    };
    Ok(match exif.as_deref().and_then(orientation) {
        Some(orientation) => turned(&image, orientation),
        None => image,
    })
}

/// Names what the bytes are instead of an image that is read.
fn unknown(bytes: &[u8]) -> DecodeError {
    match bytes {
        [] => DecodeError::NotAnImage("the file is empty".into()),
        [b'G', b'I', b'F', b'8', ..] => DecodeError::Unsupported("GIF"),
        [b'B', b'M', ..] => DecodeError::Unsupported("BMP"),
        [b'I', b'I', 42, 0, ..] | [b'M', b'M', 0, 42, ..] => DecodeError::Unsupported("TIFF"),
        [0xFF, 0x0A, ..] | [0, 0, 0, 12, b'J', b'X', b'L', ..] => {
            DecodeError::Unsupported("JPEG XL")
        }
        [_, _, _, _, b'f', b't', b'y', b'p', ..] => DecodeError::Unsupported("HEIF or AVIF"),
        [0x1F, 0x8B, ..] => DecodeError::NotAnImage("a gzip file".into()),
        _ => {
            let start: Vec<String> = bytes.iter().take(8).map(|b| format!("{b:02x}")).collect();
            DecodeError::NotAnImage(format!("starts with {}", start.join(" ")))
        }
    }
}

/// An image and its EXIF block, if that was asked for and is there.
type Decoded = (Image, Option<Vec<u8>>);

fn jpeg(bytes: &[u8], options: &Options) -> Result<Decoded, DecodeError> {
    let failed = |error: JpegError| match error {
        JpegError::ExhaustedData | JpegError::IoErrors(ZByteIoError::NotEnoughBytes(..)) => {
            DecodeError::Truncated("JPEG")
        }
        other => DecodeError::Damaged { format: "JPEG", why: other.to_string() },
    };
    // Strict: without it, damaged data give a grey area and no error. The decoder's own limits are out of the way, so
    // that ours give the message.
    let decoder_options = DecoderOptions::default()
        .set_strict_mode(true)
        .set_max_width(usize::MAX)
        .set_max_height(usize::MAX)
        .jpeg_set_out_colorspace(ColorSpace::RGB);
    let mut decoder = JpegDecoder::new_with_options(ZCursor::new(bytes), decoder_options);
    decoder.decode_headers().map_err(failed)?;
    let (width, height) = decoder.dimensions().ok_or(DecodeError::Truncated("JPEG"))?;
    options.check_size(height, width)?;
    if !has_end_marker(bytes) {
        return Err(DecodeError::Truncated("JPEG"));
    }
    let mut pixels = vec![0; 3 * width * height];
    decoder.decode_into(&mut pixels).map_err(failed)?;
    let exif = if options.exif_orientation { decoder.exif().cloned() } else { None };
    Ok((Image { height, width, pixels: pixels.into() }, exif))
}

/// Whether an end-of-image marker follows the first scan. Pillow refuses files without one; the decoder alone would not
/// miss what a truncated file lacks of its last row of blocks.
fn has_end_marker(bytes: &[u8]) -> bool {
    let mut rest = bytes;
    loop {
        rest = match rest {
            // Within a scan, 0xFF is followed by 0 unless it starts a marker.
            [0xFF, 0xDA, scan @ ..] => return scan.windows(2).rev().any(|w| w == [0xFF, 0xD9]),
            [0xFF, 0x01 | 0xD0..=0xD8, rest @ ..] => rest,
            // A segment, skipped by its length: a thumbnail within has an end marker of its own.
            [0xFF, 0x02..=0xFE, length @ ..] => {
                let Some(length_bytes) = length.first_chunk() else { return false };
                length.get(usize::from(u16::from_be_bytes(*length_bytes))..).unwrap_or_default()
            }
            [_, rest @ ..] => rest,
            [] => return false,
        };
    }
}

fn png(bytes: &[u8], options: &Options) -> Result<Decoded, DecodeError> {
    let failed = |error: png::DecodingError| match error {
        png::DecodingError::IoError(e) if e.kind() == ErrorKind::UnexpectedEof => {
            DecodeError::Truncated("PNG")
        }
        other => DecodeError::Damaged { format: "PNG", why: other.to_string() },
    };
    let mut decoder = png::Decoder::new(Cursor::new(bytes));
    // Compressed text and profiles could unpack to any size, and nobody reads them.
    decoder.set_ignore_text_chunk(true);
    decoder.set_ignore_iccp_chunk(true);
    decoder.set_transformations(png::Transformations::EXPAND | png::Transformations::STRIP_16);
    let header = decoder.read_header_info().map_err(failed)?;
    let (width, height) = (header.width as usize, header.height as usize);
    options.check_size(height, width)?;
    let mut reader = decoder.read_info().map_err(failed)?;
    let too_large = || DecodeError::TooLarge(format!("{width} x {height} pixels"));
    let mut pixels = vec![0; reader.output_buffer_size().ok_or_else(too_large)?];
    let frame = reader.next_frame(&mut pixels).map_err(failed)?;
    // The first frame of an animation that has no still image may be smaller than the canvas.
    if (frame.width as usize, frame.height as usize) != (width, height) {
        return Err(DecodeError::Unsupported("animated PNG"));
    }
    let pixels = match frame.color_type.samples() {
        1 => pixels.iter().flat_map(|&grey| [grey; 3]).collect(),
        2 => pixels.as_chunks::<2>().0.iter().flat_map(|&[grey, _]| [grey; 3]).collect(),
        4 => drop_alpha(&pixels),
        _ => pixels,
    };
    let exif = if options.exif_orientation {
        reader.info().exif_metadata.as_ref().map(|exif| exif.to_vec())
    } else {
        None
    };
    Ok((Image { height, width, pixels: pixels.into() }, exif))
}

fn webp(bytes: &[u8], options: &Options) -> Result<Decoded, DecodeError> {
    const TRUNCATED: DecodeError = DecodeError::Truncated("WebP");
    let failed = |error: image_webp::DecodingError| match error {
        image_webp::DecodingError::IoError(e) if e.kind() == ErrorKind::UnexpectedEof => TRUNCATED,
        other => DecodeError::Damaged { format: "WebP", why: other.to_string() },
    };
    let size = u32::from_le_bytes(*bytes[4..].first_chunk().ok_or(TRUNCATED)?) as usize;
    // The decoder alone would not miss the last bytes of a lossy image. One byte may be padding.
    if bytes.len() + 1 < size + 8 {
        return Err(TRUNCATED);
    }
    let mut decoder = image_webp::WebPDecoder::new(Cursor::new(bytes)).map_err(failed)?;
    let (width, height) = decoder.dimensions();
    let (width, height) = (width as usize, height as usize);
    options.check_size(height, width)?;
    let exif = if options.exif_orientation {
        decoder.set_memory_limit(EXIF_BYTES);
        decoder.exif_metadata().ok().flatten()
    } else {
        None
    };
    let channels = if decoder.has_alpha() { 4 } else { 3 };
    let mut pixels = vec![0; channels * width * height];
    decoder.read_image(&mut pixels).map_err(failed)?;
    if channels == 4 {
        pixels = drop_alpha(&pixels);
    }
    Ok((Image { height, width, pixels: pixels.into() }, exif))
}

fn drop_alpha(pixels: &[u8]) -> Vec<u8> {
    pixels.as_chunks::<4>().0.iter().flat_map(|&[red, green, blue, _]| [red, green, blue]).collect()
}

/// Most bytes of an EXIF block that are looked at. The orientation stands in its first directory.
const EXIF_BYTES: usize = 64 << 10;

/// The orientation (tag 0x0112) of an EXIF block: 2 to 8. `None` if there is none, if it is 1 (upright), or if the
/// block makes no sense.
fn orientation(exif: &[u8]) -> Option<u8> {
    // WebP files are seen with and without JPEG's prefix.
    let tiff = exif.strip_prefix(b"Exif\0\0").unwrap_or(exif);
    let tiff = &tiff[..tiff.len().min(EXIF_BYTES)];
    let little = match tiff.first_chunk::<4>()? {
        b"II\x2A\0" => true,
        b"MM\0\x2A" => false,
        _ => return None,
    };
    let u16_at = |at: usize| {
        let bytes = *tiff.get(at..)?.first_chunk()?;
        Some(if little { u16::from_le_bytes(bytes) } else { u16::from_be_bytes(bytes) })
    };
    let first_directory = *tiff[4..].first_chunk()?;
    let first_directory = if little {
        u32::from_le_bytes(first_directory)
    } else {
        u32::from_be_bytes(first_directory)
    } as usize;
    let entries = usize::from(u16_at(first_directory)?);
    for entry in 0..entries {
        let at = first_directory + 2 + 12 * entry;
        const ORIENTATION: u16 = 0x0112;
        const SHORT: u16 = 3;
        if u16_at(at)? == ORIENTATION {
            let value = u16_at(at + 8).filter(|_| u16_at(at + 2) == Some(SHORT))?;
            return u8::try_from(value).ok().filter(|value| (2..=8).contains(value));
        }
    }
    None
}

/// The image as it should be shown, given that it is stored with `orientation` (EXIF 2.3, tag 0x0112).
fn turned(image: &Image, orientation: u8) -> Image {
    // In the stored image: is the shown image's row a column, and do rows and columns run backwards.
    let (transposed, rows_back, columns_back) = match orientation {
        2 => (false, false, true),
        3 => (false, true, true),
        4 => (false, true, false),
        5 => (true, false, false),
        6 => (true, true, false),
        7 => (true, true, true),
        _ => (true, false, true),
    };
    let (height, width) =
        if transposed { (image.width, image.height) } else { (image.height, image.width) };
    let mut pixels = Vec::with_capacity(image.pixels.len());
    for y in 0..height {
        for x in 0..width {
            let (row, column) = if transposed { (x, y) } else { (y, x) };
            let row = if rows_back { image.height - 1 - row } else { row };
            let column = if columns_back { image.width - 1 - column } else { column };
            let start = 3 * (row * image.width + column);
            pixels.extend_from_slice(&image.pixels[start..start + 3]);
        }
    }
    Image { height, width, pixels: pixels.into() }
}
