//! Features of pictures that the connector in training reads, with the places of its rows among a batch's tokens.

use tch::{Kind, Tensor};

use super::example::{Example, running_sum};
use super::rows::RowsFile;
use crate::base::{Error, Result};
use crate::finetune::cut::ConnectorInput;
use crate::finetune::error::torch_error;

/// Features of all pictures, one row after the other.
#[derive(Debug)]
pub struct ConnectorRows {
    input: ConnectorInput,
    rows: RowsFile,
    /// First row of each example.
    starts: Vec<u64>,
}

/// What the connector reads of a batch.
#[derive(Debug)]
pub struct ConnectorBatch {
    /// f32 features: `[tiles, rows, width]`, or `[rows, width]` for a connector that takes rows.
    pub features: Tensor,
    /// i64 `[B, T]`: the token's own number in `[B * T]`, or at an image token `B * T` plus the number of the connector's row.
    pub places: Tensor,
}

/// Rows of features of a sample.
pub fn feature_rows(example: &Example) -> usize {
    example.detail().pictures.iter().map(|&[tiles, rows]| tiles as usize * rows as usize).sum()
}

impl ConnectorRows {
    /// Pairs examples with the rows of their pictures, which are in the same order.
    pub fn new(input: ConnectorInput, rows: RowsFile, examples: &[Example]) -> Self {
        let starts = running_sum(examples.iter().map(feature_rows));
        ConnectorRows { input, rows, starts }
    }

    /// The features of these samples in host memory; `None` without pictures. `time`: tokens of the longest sample.
    ///
    /// Errors: `Error::Unsupported` for tiles of different sizes that the connector cannot take together; `Error::Io`;
    /// `Error::Engine`.
    pub fn batch(&self, all: &[Example], samples: &[usize], time: usize) -> Result<Option<ConnectorBatch>> {
        let pictures = samples.iter().flat_map(|&sample| &all[sample].detail().pictures);
        let pictures: Vec<[i64; 2]> = pictures.map(|picture| picture.map(i64::from)).collect();
        let Some([_, first]) = pictures.first() else { return Ok(None) };
        let (tiles, rows) = pictures.iter().fold((0, 0), |(tiles, rows), [own, each]| (tiles + own, rows + own * each));
        let ConnectorInput { width, rank, row_wise } = self.input;
        let width = width as i64;
        let shape = match (rank, pictures.iter().all(|[_, each]| each == first)) {
            (2, _) => vec![rows, width],
            (_, true) => vec![tiles, *first, width],
            (_, false) if row_wise => vec![1, rows, width],
            (_, false) => {
                let ids: Vec<&str> = samples.iter().map(|&sample| all[sample].id.as_str()).collect();
                let problem = format!(
                    "has pictures whose tiles give different numbers of features ({}), and the connector does not work row by row",
                    crate::base::list_preview(&ids, 4)
                );
                return Err(Error::unsupported("a batch", problem)
                    .remedy("leave the connector as it is with `--lora-layers trained`"));
            }
        };
        let mut bytes = Vec::new();
        let mut places: Vec<i64> = (0..(samples.len() * time) as i64).collect();
        let mut next = places.len() as i64;
        for (row, &sample) in samples.iter().enumerate() {
            self.rows.read(self.starts[sample], feature_rows(&all[sample]), &mut bytes)?;
            let image = all[sample].detail().image.iter();
            for at in image.flat_map(|&[start, count]| start as usize..(start + count) as usize) {
                places[row * time + at] = next;
                next += 1;
            }
        }
        let make = || -> Result<ConnectorBatch, tch::TchError> {
            Ok(ConnectorBatch {
                features: Tensor::f_from_data_size(&bytes, &shape, Kind::Float)?,
                places: Tensor::f_from_slice(&places)?.f_view([samples.len() as i64, time as i64])?,
            })
        };
        make().map(Some).map_err(torch_error("the connector's features"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::finetune::data::rows::{RowDtype, RowsWriter};
    use crate::runtime::{SideValues, Unprojected};

    fn example(id: &str, image: &[bool], pictures: &[[usize; 2]]) -> Example {
        let ids: Vec<i64> = (0..image.len() as i64).collect();
        let mut example = Example::new(id.into(), &ids, &vec![true; ids.len()]).unwrap();
        let unprojected = pictures.iter().map(|&[tiles, rows]| Unprojected { tiles, rows, width: 1, data: Vec::new() });
        let unprojected = unprojected.map(std::sync::Arc::new).collect();
        example.keep(None, &SideValues { image: image.to_vec(), unprojected, ..SideValues::default() });
        example
    }

    #[test]
    fn features_are_joined_and_their_rows_take_the_places_of_image_tokens() {
        let folder = tempfile::tempdir().unwrap();
        let examples = [
            example("tiles", &[false, true, true, false], &[[2, 2]]),
            example("text", &[false, false], &[]),
            example("two", &[true, false, true], &[[1, 2], [1, 2]]),
            example("large", &[true, false], &[[1, 3]]),
        ];
        let made = |rank: usize, row_wise: bool| {
            let mut writer = RowsWriter::create(&folder.path().join("rows"), RowDtype::F32).unwrap();
            writer.push(&(0..11).map(|number| number as f32).collect::<Vec<_>>(), 11).unwrap();
            ConnectorRows::new(ConnectorInput { width: 1, rank, row_wise }, writer.finish().unwrap(), &examples)
        };
        let rows = made(3, false);
        let batch = |rows: &ConnectorRows, samples: &[usize], time: usize| rows.batch(&examples, samples, time);
        let found = batch(&rows, &[2, 0], 4).unwrap().unwrap();
        let floats = |tensor: &Tensor| Vec::<f32>::try_from(tensor.flatten(0, -1)).unwrap();
        assert_eq!(
            (found.features.size(), floats(&found.features)),
            (vec![4, 2, 1], vec![4., 5., 6., 7., 0., 1., 2., 3.])
        );
        // Places 8 and up are the connector's rows; others are the tokens' own, padding among them.
        let places = Vec::<i64>::try_from(found.places.flatten(0, -1)).unwrap();
        assert_eq!((found.places.size(), places), (vec![2, 4], vec![8, 1, 9, 3, 4, 10, 11, 7]));
        assert!(batch(&rows, &[1], 2).unwrap().is_none());
        let refused = batch(&rows, &[0, 3], 4).unwrap_err().to_string();
        assert!(refused.contains("`tiles`, `large`") && refused.contains("row by row"), "{refused}");
        let sizes =
            [made(3, true), made(2, false)].map(|rows| batch(&rows, &[0, 3], 4).unwrap().unwrap().features.size());
        assert_eq!(sizes, [vec![1, 7, 1], vec![7, 1]]);
    }
}
