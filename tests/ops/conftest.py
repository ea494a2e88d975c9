import pytest
import torch


@pytest.fixture
def graphs():
    class Recording:
        def __init__(self):
            self.graphs = []

        def __call__(self, graph, example_inputs):
            self.graphs.append(graph)
            return graph.forward

        @property
        def targets(self):
            return [{str(n.target) for n in g.graph.nodes} for g in self.graphs]

    torch._dynamo.reset()
    yield Recording()
    torch._dynamo.reset()
