//! Images: the schema, its containers, and where they are kept.

mod container;
mod dir;
mod error;
mod kind;
mod map;
pub mod names;
pub mod schema;
mod scratch;
mod store;

pub use container::{
    ImageReader, ImageWriter, get_reader, get_record, get_records, put_image, put_records,
    write_image,
};
pub use dir::{DirSink, DirSource};
pub use error::ImageError;
pub use kind::Kind;
pub use scratch::Scratch;
pub use store::{GENERATIONS_MAX, Generation, Generations, ImageSink, ImageSource, PARENT_PREFIX};
