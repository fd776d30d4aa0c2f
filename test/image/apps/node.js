// A server of one page, with the framework and the library of functions that most have.
const express = require('express');
const _ = require('lodash');

const app = express();
app.get('/', (request, response) => response.json({ready: true, primes: _.filter(_.range(2, 30), n => _.every(_.range(2, n), d => n % d))}));
app.listen(8080, '127.0.0.1');
